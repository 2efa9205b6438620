"""The commands of docs/your_own_data.md run, on tiny parts, from files to an answer."""

import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from nextgpt import check_data, inference, process_embeddings
from nextgpt.config.loader import load_config
from nextgpt.generation.history import read_history
from test_documentation import ROOT, blocks, commands, program
from tiny_components import tiny_overrides
from tiny_decoders import tiny_decoder
from tiny_run import TinyRun, tiny_world, trained

PAGE = ROOT / "docs/your_own_data.md"
MAINS = {
    "check_data": check_data.main,
    "inference": inference.main,
    "process_embeddings": process_embeddings.main,
}


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """The page's folder, with the page's own questions."""
    folder = tmp_path / "data" / "birds"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30), "brown").save(folder / "robin.jpg")
    audio = tiny_world() / "data/mini_world/T-X_pair_data/audio/audios"
    shutil.copy(next(audio.iterdir()), folder / "song.wav")
    (folder / "robin.txt").write_text("a robin on a snowy branch\n")
    (folder / "song.txt").write_text("a blackbird sings in the rain\n")
    (folder / "questions.jsonl").write_text(blocks(PAGE, "json")[0])
    return folder


def with_tiny_parts(words: list[str], folder: Path) -> list[str]:
    """A command's arguments with its files in `folder` and tiny components."""
    places = {
        r"data/birds": str(folder / "data/birds"),
        r"outputs/": f"{folder}/outputs/",
        r"ckpt/delta_ckpt/nextgpt/mini_tiva_v0": str(trained(3).folder),
        r"ckpt/pretrained_ckpt/mini_stable_diffusion": str(tiny_decoder("image")),
        r"ckpt/pretrained_ckpt/mini_audioldm": str(tiny_decoder("audio")),
    }
    found = []
    for word in words:
        for place, target in places.items():
            word = re.sub(rf"(?<![\w/]){place}", target, word)
        found.append(word)
    return found


def train(arguments: list[str], folder: Path) -> None:
    sets = [after for word, after in pairwise(arguments) if word == "--set"]
    flags = arguments[arguments.index("--init-from") :][:2] if "--init-from" in arguments else []
    stage = int(arguments[arguments.index("--stage") + 1])
    save_path = Path(arguments[arguments.index("--save_path") + 1])
    sets += ["training.max_steps=2", "training.epochs=2", f"data.cache_dir={folder / 'cache'}"]
    run = TinyRun(save_path, stage, sets, flags).finish()
    assert len(run.losses) == 2 and run.metrics[-1]["skipped"] == 0


def run(main: Callable[[], None], arguments: list[str], folder: Path) -> None:
    overrides = [*tiny_overrides(tiny_world()), f"data.cache_dir={folder / 'cache'}"]
    if "--config" in arguments:
        at = arguments.index("--config")
        settings = [word for override in overrides for word in ("--set", override)]
        arguments = [*arguments[:at], "--config", "7b", *settings, *arguments[at + 2 :]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["entry", *arguments])
        try:
            main()
        except SystemExit as ended:
            assert not ended.code


def test_commands_of_the_page_lead_from_files_to_an_answer(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    for folder, words in commands(PAGE):
        file, arguments = program(folder, with_tiny_parts(words, tmp_path))
        if file.name == "train.sh":
            train(arguments, tmp_path)
        else:
            run(MAINS[file.stem], arguments, tmp_path)
        ran.append(file.stem)
    assert ran == [
        "check_data", "check_data", "train", "inference", "process_embeddings",
        "process_embeddings", "train",
    ]  # fmt: skip
    output = capsys.readouterr().out
    assert "folder of media with .txt captions" in output and "JSON lines" in output
    assert "input media: 1 image, 1 audio" in output
    asked = read_history(tmp_path / "outputs/robin/history.json")[0]
    assert asked.parts[0].path == str(birds / "robin.jpg")


def test_yaml_of_the_page_is_that_of_its_command() -> None:
    command = next(words for _, words in commands(PAGE) if words[1].endswith("train.sh"))
    (value,) = (word for word in command if word.startswith("data.datasets="))
    data = yaml.safe_load(blocks(PAGE, "yaml")[0])["data"]
    assert yaml.safe_load(value.partition("=")[2]) == data["datasets"]
    assert (
        load_config("mini", 3, [value, "data.batching=weighted"]).data.batching
        == (data["batching"])
    )
