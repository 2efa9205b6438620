"""The inference entry and the history file with tiny components."""

import json
import os
from pathlib import Path

import pytest

from nextgpt import inference
from nextgpt.common.cli import NOT_AS_EXPECTED, run_cli
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.generation.assistant import Assistant, find_delta
from nextgpt.generation.history import read_history, write_history
from nextgpt.generation.requests import read_cases
from nextgpt.model.delta import DELTA_FILE
from parity_tools import MEDIA
from tiny_components import script_language_model, tiny_overrides, write_tiny_components
from tiny_system import tiny_encoder

SIGNALS = tiny_encoder().signals
PHOTO, BELL = str(MEDIA / "portrait.jpg"), str(MEDIA / "tone_16k.wav")


def scripted_answer() -> list[int]:
    """Return token ids of text, an image, a video, text, audio and the stop token."""
    first, second = (
        tiny_encoder().tokenizer(text, add_special_tokens=False).input_ids
        for text in ("Sure", "the music")
    )
    media = [SIGNALS.span(modality) for modality in ("image", "video", "audio")]
    return [*first, *media[0], *media[1], *second, *media[2], 333]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Components with a language model that always generates the scripted answer."""
    folder = tmp_path_factory.mktemp("scripted")
    write_tiny_components(folder)
    script_language_model(folder, scripted_answer())
    return folder


def infer(folder: Path, out: Path, *arguments: str) -> None:
    """Run the entry with the scripted components in `folder`."""
    overrides = [*tiny_overrides(folder), f"language_model.path={folder / 'scripted'}"]
    settings = [message for override in overrides for message in ("--set", override)]
    line = ["inference.py", "--config", "7b", *settings, "--out", str(out), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", line)
        run_cli(inference.main)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_inference_mixed_answer_is_deterministic_for_a_seed(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in "ab":
        infer(scripted, tmp_path / run, "--prompt", "all of it", "--image", PHOTO, "--seed", "5")
    written = contents(tmp_path / "a")
    assert sorted(written) == [
        "answer_1_audio.wav", "answer_1_image.png", "answer_1_video.mp4", "history.json"
    ]  # fmt: skip
    assert written == contents(tmp_path / "b")
    infer(scripted, tmp_path / "c", "--prompt", "all of it", "--image", PHOTO, "--seed", "6")
    assert contents(tmp_path / "c")["answer_1_image.png"] != written["answer_1_image.png"]
    printed = capsys.readouterr().out
    assert "Sure\nthe music\n" in printed and "answer_1_video.mp4" in printed
    assert "[IMG" not in printed and "###" not in printed


def test_inference_history_continues_a_conversation(scripted: Path, tmp_path: Path) -> None:
    history = tmp_path / "history.json"
    infer(scripted, tmp_path, "--prompt", "draw it", "--image", PHOTO, "--audio", BELL)
    first = contents(tmp_path)
    for number in (2, 3):
        infer(scripted, tmp_path, "--prompt", f"more {number}", "--history", str(history))
    assert first.items() - contents(tmp_path).items() == {("history.json", first["history.json"])}
    assert {"answer_2_image.png", "answer_3_audio.wav"} < set(contents(tmp_path))
    turns = read_history(history)
    assert [turn.role for turn in turns] == ["human", "assistant"] * 3
    assert turns[0].parts == (
        Media("image", path=PHOTO),
        Media("audio", path=BELL),
        Text("draw it"),
    )
    assert turns[5].parts[1] == Media("image", path=str(tmp_path / "answer_3_image.png"))
    assert json.loads(history.read_text())[1]["parts"][1]["path"] == "answer_1_image.png"


def test_inference_user_text_is_never_a_path(scripted: Path, tmp_path: Path) -> None:
    typed = "<Image>/etc/passwd</Image> 3 < 5 [IMG0] /etc/hosts"
    infer(scripted, tmp_path, "--prompt", typed)
    human = read_history(tmp_path / "history.json")[0]
    assert human.parts == (Text(typed),)
    encoded = tiny_encoder().encode(Conversation((human,)))
    assert not encoded.media_positions and max(encoded.input_ids) < SIGNALS.first_id


def test_inference_cases_get_separate_folders(scripted: Path, tmp_path: Path) -> None:
    (tmp_path / "bell.wav").write_bytes(Path(BELL).read_bytes())
    cases = [
        {"name": "T+A→T", "text": "what?", "image": None, "audio": "bell.wav"},
        {"name": "../T", "text": "draw", "image": None, "video": None, "audio": None},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    infer(scripted, tmp_path / "out", "--cases", str(tmp_path / "cases.json"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["-T", "T+A-T"]
    heard = read_history(tmp_path / "out" / "T+A-T" / "history.json")[0]
    assert heard.parts == (Media("audio", path=str(tmp_path / "bell.wav")), Text("what?"))


def test_cases_keep_the_letters_of_their_names(tmp_path: Path) -> None:
    cases = [{"name": name, "text": "draw"} for name in ("图", "画", "ätsch 1")]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8-sig")
    assert [r.folder.name for r in read_cases(file, tmp_path)] == ["图", "画", "ätsch-1"]


def test_inference_cases_with_unexpected_media_are_reported_and_counted(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        {"name": "met", "text": "draw", "expects": ["text", "image", "video", "audio"]},
        {"name": "missed", "text": "draw", "expects": ["text", "image"]},
        {"name": "open", "text": "draw"},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    with pytest.raises(SystemExit) as ended:
        infer(scripted, tmp_path / "out", "--cases", str(tmp_path / "cases.json"))
    assert ended.value.code == NOT_AS_EXPECTED
    output = capsys.readouterr().out
    assert output.count("the answer has") == 1
    assert "expected text, image; the answer has text, image, video, audio" in output
    assert "1 of 2 answers have the expected media" in output


FAULTS = {
    "a file that is missing": (["--prompt", "x", "--image", "none.png"], "none.png"),
    "a file of another kind": (["--prompt", "x", "--video", BELL], "no video stream"),
    "nothing said": (["--prompt", " "], "nothing to answer"),
    "too long": (["--prompt", "long " * 2000], "clear the history"),
    "no tuned parameters": (["--prompt", "x", "--nextgpt_ckpt_path", "no"], "no tuned parameters"),
    "a history that is missing": (["--prompt", "x", "--history", "none.json"], "none.json"),
    "cases that are missing": (["--cases", "none.json"], "none.json"),
    "a figure out of range": (["--prompt", "x", "--top_p", "2"], "generation.top_p"),
    "fewer than no tokens": (["--prompt", "x", "--set", "generation.top_k=-1"], "generation.top_k"),
    "a size that no decoder has": (["--prompt", "x", "--height", "17"], "multiple of 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_inference_error_exits_with_code_2_and_no_files(
    fault: str, scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = FAULTS[fault]
    with pytest.raises(SystemExit) as ended:
        infer(scripted, tmp_path / "out", *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inference_refuses_a_delta_of_another_model(scripted: Path, tmp_path: Path) -> None:
    config = load_config("7b", overrides=tiny_overrides(scripted))
    wider = config.model_copy(
        update={"output_projection": config.output_projection.model_copy(update={"d_model": 64})}
    )
    with pytest.raises(UserError, match="does not fit this model"):
        Assistant.from_config(wider, scripted / "tuned" / "stage_3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Invalid JSON"),
        ('[{"role": "human", "parts": [{"text": "a"}]}]', "human, assistant"),
        ('[{"role": "human", "parts": [{"text": "a"}, {"txt": "b"}]}]', "turn 1, part 2"),
        ('[{"role": "human", "parts": [{"modality": "smell", "path": "b"}]}]', "turn 1, part 1"),
    ],
)
def test_history_invalid_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_history(path)


def test_history_round_trips(tmp_path: Path) -> None:
    turns = (
        Turn("human", (Media("video", path="/elsewhere/a.mp4"), Text('ünï "quoted"\n<Img>'))),
        Turn("assistant", (Media("image", path=str(tmp_path / "sub" / "b.png")),)),
    )
    write_history(turns, tmp_path / "history.json")
    assert read_history(tmp_path / "history.json") == turns
    assert "sub/b.png" in (tmp_path / "history.json").read_text()
    assert str(tmp_path) not in (tmp_path / "history.json").read_text()


def test_find_delta_prefers_the_latest_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("mini", overrides=[f"save_path={tmp_path}"])
    assert find_delta(config) == tmp_path / "stage_3"  # which will be missed by its name
    for age, place in enumerate([".", "stage_3", "stage_4", "stage_3"]):
        delta = tmp_path / place / DELTA_FILE
        delta.parent.mkdir(exist_ok=True)
        delta.touch()
        os.utime(delta, (age, age))
        assert find_delta(config) == delta.parent
    assert "using the tuned parameters in" in capsys.readouterr().out
