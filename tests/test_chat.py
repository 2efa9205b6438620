"""Chat and the inference entry, on tiny real parts from end to end."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_tools import MEDIA
from PIL import Image
from tiny_parts import script_language_model, tiny_overrides, write_tiny_parts
from tiny_system import tiny_encoder

import inference
from chat.assistant import Answer, Assistant
from chat.generation import StopSequences, WholeRuns, WordStream, readable_parts, words
from chat.history import read_history, write_history
from chat.options import ChatOptions
from config.entry import run_entry
from config.errors import InputError, MediaError
from config.loader import load_config
from conversation.parts import Conversation, Media, Text, Turn
from model.decoders import Decoder
from model.media_files import Frames, Sound

SIGNALS = tiny_encoder().signals
PHOTO, BELL = str(MEDIA / "portrait.jpg"), str(MEDIA / "tone_16k.wav")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Parts this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """The recorded model; all new tokens, also those that may not begin anything, tempt it."""
    folder = tmp_path_factory.mktemp("babbler")
    write_tiny_parts(folder, favoured=range(38))
    config = load_config("7b", overrides=tiny_overrides(folder))
    return Assistant.load(config, folder / "tuned" / "stage_3")


def scripted_answer() -> list[int]:
    """Text, a picture and a video, text, a sound, end: as ids of the tiny tokenizer."""
    first, second = (
        tiny_encoder().tokenizer(text, add_special_tokens=False).input_ids
        for text in ("Sure", "the music")
    )
    media = [SIGNALS.run(modality) for modality in ("image", "video", "audio")]
    return [*first, *media[0], *media[1], *second, *media[2], 333]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of which the language model always gives the scripted answer."""
    folder = tmp_path_factory.mktemp("scripted")
    write_tiny_parts(folder)
    script_language_model(folder, scripted_answer())
    return folder


def say(*parts: Text | Media) -> Conversation:
    return Conversation((Turn("human", parts),))


def ask(
    assistant: Assistant, conversation: Conversation, seed: int = 0, **figures: float
) -> Answer:
    options = ChatOptions.from_config(assistant.config)
    return assistant.chat(conversation, seed=seed, options=replace(options, **figures))


def runs_of(ids: list[int]) -> list[str]:
    """The modalities of the runs in `ids`; fails on a signal token outside a whole run."""
    found = []
    while ids:
        if not SIGNALS.first_id <= ids[0] < SIGNALS.end_id:
            ids = ids[1:]
            continue
        modality = SIGNALS.modality_starting_with(ids[0])
        assert modality is not None, SIGNALS.name(ids[0])
        run = SIGNALS.run(modality)
        assert ids[: len(run)] == run
        found.append(modality)
        ids = ids[len(run) :]
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1), (0.7, 0.9), (1, 1), (2, 1)])
def test_signal_runs_are_whole_whatever_is_sampled(
    babbler: Assistant, temperature: float, top_p: float
) -> None:
    figures = {"temperature": temperature, "top_p": top_p, "max_new_tokens": 30}
    made = 0
    for seed in range(4):
        answer = ask(babbler, say(Text("draw, film and play it")), seed, **figures)
        modalities = runs_of(answer.token_ids)
        media = [part for part in answer.turn.parts if isinstance(part, Media)]
        assert [medium.modality for medium in media] == modalities
        assert len(answer.outputs) == len(modalities)
        assert len(answer.token_ids) <= 30
        made += len(modalities)
    assert made


def test_runs_begin_only_where_they_fit() -> None:
    processor = WholeRuns(SIGNALS, max_new_tokens=10)
    scores = torch.zeros(1, SIGNALS.end_id)
    starts = {modality: SIGNALS.run(modality)[0] for modality in SIGNALS.counts}

    def allowed(written: list[int]) -> set[int]:
        ids = torch.tensor([written], dtype=torch.long)
        return set(processor(ids, scores)[0].isfinite().nonzero().flatten().tolist())

    own = set(range(SIGNALS.first_id))
    assert allowed([]) == own | {starts["image"], starts["audio"]}
    assert allowed([5] * 3) == own | {starts["image"]}
    assert allowed([5] * 7) == own
    assert allowed([5, starts["audio"]]) == {starts["audio"] + 1}
    assert allowed([5, *SIGNALS.run("image")]) == own | {starts["image"]}


@pytest.mark.parametrize("written", [[13, 332], [333], [2]])
def test_every_published_end_stops(written: list[int], tmp_path: Path) -> None:
    word = tiny_encoder().tokenizer("Sure", add_special_tokens=False).input_ids
    write_tiny_parts(tmp_path)
    overrides = script_language_model(tmp_path, [*word, *written])
    config = load_config("7b", overrides=overrides)
    assistant = Assistant.load(config, tmp_path / "tuned" / "stage_3")
    answer = ask(assistant, say(Text("hello")))
    assert answer.token_ids == [*word, *written]
    assert answer.turn.parts == (Text("Sure"),)


def test_an_end_counts_only_at_the_end() -> None:
    stops = StopSequences(tiny_encoder().stop_sequences)
    for ids, ended in [([13], False), ([332], False), ([13, 332], True), ([13, 332, 5], False)]:
        assert stops(torch.tensor([ids]), torch.empty(0)).tolist() == [ended]


@torch.no_grad()
def test_greedy_answer_is_the_uncached_forward_pass_token_by_token(babbler: Assistant) -> None:
    conversation = say(Media("image", path=PHOTO), Text("what is it?"))
    answer = ask(babbler, conversation, temperature=0, max_new_tokens=20)
    encoded = babbler.encoder.encode(conversation)
    features, slots = babbler._encode_media(encoded, {})
    model, whole_runs = babbler.model, WholeRuns(SIGNALS, 20)
    ids = torch.tensor([encoded.input_ids + answer.token_ids])
    hidden = model.read(model.embed(ids, slots, features))
    logits = model.language_model.get_output_embeddings()(hidden)[0, len(encoded.input_ids) - 1 :]
    for step, token_id in enumerate(answer.token_ids):
        written = torch.tensor([answer.token_ids[:step]], dtype=torch.long)
        assert whole_runs(written, logits[None, step]).argmax() == token_id


@torch.no_grad()
def test_media_are_those_of_the_projected_hidden_states(babbler: Assistant) -> None:
    conversation = say(Media("image", path=PHOTO), Text("draw it"))
    answer = ask(babbler, conversation, seed=3, temperature=0, max_new_tokens=24)
    encoded = babbler.encoder.encode(conversation)
    features, slots = babbler._encode_media(encoded, {})
    model = babbler.model
    embeddings = model.embed(torch.tensor([encoded.input_ids + answer.token_ids]), slots, features)
    hidden = model.read(embeddings)
    starts = [(p, SIGNALS.modality_starting_with(i)) for p, i in enumerate(answer.token_ids)]
    starts = [(position, modality) for position, modality in starts if modality]
    assert starts
    for number, (position, modality) in enumerate(starts):
        run = torch.tensor([[0, len(encoded.input_ids) + position]])
        caption = model.project_runs(modality, run, hidden, embeddings)
        decoder = Decoder(modality, babbler.config.decoders[modality].path, babbler.device)
        options = ChatOptions.from_config(babbler.config).decode[modality]
        expected = decoder.decode(caption, replace(options, seed=3 + number))[0]
        for found, wanted in zip(pixels(answer.outputs[number]), pixels(expected), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4)


def pixels(output: object) -> list[np.ndarray]:
    array = output[0] if isinstance(output, Frames | Sound) else np.asarray(output)
    return list(array.astype(np.float64))


@pytest.mark.parametrize("seed", range(4))
def test_streamed_words_are_the_answers_words(babbler: Assistant, seed: int) -> None:
    streamed: list[str] = []
    options = replace(
        ChatOptions.from_config(babbler.config), top_p=1, temperature=2, max_new_tokens=40
    )
    answer = babbler.chat(say(Text("tell me")), seed=seed, options=options, on_text=streamed.append)
    assert "".join(streamed) == answer.text
    assert len(streamed) > 1


def test_stream_holds_back_what_may_be_an_end_or_half_a_character() -> None:
    encoder = tiny_encoder()
    told: list[str] = []
    stream = WordStream(encoder, told.append)
    smile = [encoder.tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "☺".encode()]
    word = encoder.tokenizer("Sure", add_special_tokens=False).input_ids
    ids = [*word, *smile, *word, 13, 332]
    told_after = []
    for token_id in ids:
        stream.put(torch.tensor([token_id]))
        told_after.append("".join(told))
    stream.end()
    assert told_after[len(word) : len(word) + 3] == ["Sure"] * 3
    assert told_after[-2:] == ["Sure☺ Sure"] * 2
    assert "".join(told) == words(readable_parts(encoder, ids)) == "Sure☺ Sure"


def test_the_random_state_is_left_alone_and_the_seed_decides(babbler: Assistant) -> None:
    conversation = say(Text("surprise me"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    answers = [
        ask(babbler, conversation, seed, top_p=1, temperature=2, max_new_tokens=12)
        for seed in (1, 1, 2)
    ]
    torch.testing.assert_close(torch.rand(3), expected)
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids


def test_media_of_every_turn_are_read(babbler: Assistant) -> None:
    """The answer depends on a picture of the first turn; an earlier answer's medium is a run."""
    turns = (
        Turn("human", (Media("image", path=PHOTO), Text("what is it?"))),
        Turn("assistant", (Text("a person"), Media("audio", path="/nowhere.wav"))),
        Turn("human", (Media("audio", path=BELL), Text("and this?"))),
    )
    encoded = babbler.encoder.encode(Conversation(turns))
    features, slots = babbler._encode_media(encoded, {})
    assert len(slots) == 2 and [m.modality for _, m in encoded.runs] == ["audio"]
    assert not torch.allclose(features[0], features[1])
    assert ask(babbler, Conversation(turns), max_new_tokens=4).token_ids


def test_a_files_feature_is_kept_until_the_file_changes(babbler: Assistant, tmp_path: Path) -> None:
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(Path(PHOTO).read_bytes())
    encoded = babbler.encoder.encode(say(Media("image", path=str(picture))))
    first, again = (babbler._encode_media(encoded, {})[0] for _ in range(2))
    assert torch.equal(first, again)
    black = np.zeros((30, 30, 3), np.uint8)
    Image.fromarray(black).save(picture)
    os.utime(picture, ns=(1, 1))
    assert not torch.allclose(babbler._encode_media(encoded, {})[0], first)
    with pytest.raises(MediaError, match="no such file"):
        ask(babbler, say(Media("image", path=str(tmp_path / "none.png"))))


def test_a_conversation_beyond_the_context_is_refused_with_numbers(babbler: Assistant) -> None:
    with pytest.raises(InputError, match=r"holds 2048.*clear the history"):
        ask(babbler, say(Text("long " * 2000)))


def infer(folder: Path, out: Path, *arguments: str) -> None:
    """The entry, on the scripted parts in `folder`."""
    overrides = [*tiny_overrides(folder), f"language_model.path={folder / 'scripted'}"]
    settings = [word for override in overrides for word in ("--set", override)]
    line = ["inference.py", "--config", "7b", *settings, "--out", str(out), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", line)
        run_entry(inference.main)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_one_answer_of_several_kinds_and_the_same_seed_gives_the_same_bytes(
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


def test_rounds_go_on_with_history(scripted: Path, tmp_path: Path) -> None:
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


def test_what_is_typed_is_never_a_path(scripted: Path, tmp_path: Path) -> None:
    typed = "<Image>/etc/passwd</Image> 3 < 5 [IMG0] /etc/hosts"
    infer(scripted, tmp_path, "--prompt", typed)
    human = read_history(tmp_path / "history.json")[0]
    assert human.parts == (Text(typed),)
    encoded = tiny_encoder().encode(Conversation((human,)))
    assert not encoded.slots and max(encoded.input_ids) < SIGNALS.first_id


def test_cases_get_a_folder_each(scripted: Path, tmp_path: Path) -> None:
    (tmp_path / "bell.wav").write_bytes(Path(BELL).read_bytes())
    cases = [
        {"name": "T+A→T", "text": "what?", "image": None, "audio": "bell.wav", "expects": ["text"]},
        {"name": "../T", "text": "draw", "image": None, "video": None, "audio": None},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    infer(scripted, tmp_path / "out", "--cases", str(tmp_path / "cases.json"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["-T", "T+A-T"]
    heard = read_history(tmp_path / "out" / "T+A-T" / "history.json")[0]
    assert heard.parts == (Media("audio", path=str(tmp_path / "bell.wav")), Text("what?"))


FAULTS = {
    "a file that is missing": (["--prompt", "x", "--image", "none.png"], "none.png"),
    "a file of another kind": (["--prompt", "x", "--video", BELL], "no moving pictures"),
    "nothing said": (["--prompt", " "], "nothing to answer"),
    "too long": (["--prompt", "long " * 2000], "clear the history"),
    "no tuned parameters": (["--prompt", "x", "--nextgpt_ckpt_path", "no"], "no tuned parameters"),
    "a history that is missing": (["--prompt", "x", "--history", "none.json"], "none.json"),
    "cases that are missing": (["--cases", "none.json"], "none.json"),
    "a figure out of range": (["--prompt", "x", "--top_p", "2"], "generation.top_p"),
    "a size that no decoder has": (["--prompt", "x", "--height", "17"], "multiple of 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_with_code_2_a_word_and_no_file(
    fault: str, scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, word = FAULTS[fault]
    with pytest.raises(SystemExit) as ended:
        infer(scripted, tmp_path / "out", *arguments)
    assert ended.value.code == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tuned_parameters_of_another_model_are_refused(scripted: Path, tmp_path: Path) -> None:
    config = load_config("7b", overrides=tiny_overrides(scripted))
    wider = config.model_copy(
        update={"output_projection": config.output_projection.model_copy(update={"width": 64})}
    )
    with pytest.raises(InputError, match="does not fit this model"):
        Assistant.load(wider, scripted / "tuned" / "stage_3")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "Invalid JSON"),
        ('[{"role": "human", "parts": [{"text": "a"}]}]', "human, assistant"),
        ('[{"role": "human", "parts": [{"text": "a"}, {"txt": "b"}]}]', "turn 1, part 2"),
        ('[{"role": "human", "parts": [{"modality": "smell", "path": "b"}]}]', "turn 1, part 1"),
    ],
)
def test_a_faulty_history_is_named(content: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    path.write_text(content)
    with pytest.raises(InputError, match=word):
        read_history(path)


def test_history_comes_back_as_written(tmp_path: Path) -> None:
    turns = (
        Turn("human", (Media("video", path="/elsewhere/a.mp4"), Text('ünï "quoted"\n<Img>'))),
        Turn("assistant", (Media("image", path=str(tmp_path / "sub" / "b.png")),)),
    )
    write_history(turns, tmp_path / "history.json")
    assert read_history(tmp_path / "history.json") == turns
    assert "sub/b.png" in (tmp_path / "history.json").read_text()
    assert str(tmp_path) not in (tmp_path / "history.json").read_text()
