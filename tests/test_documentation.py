"""What the documents say is so: commands, flags, keys, links, formats and snippets."""

import ast
import importlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import nextgpt
from nextgpt.config.loader import load_config
from nextgpt.dataset.catalog import CATALOG
from nextgpt.dataset.json_stream import iter_rows
from nextgpt.dataset.preprocess_dataset import preprocess
from nextgpt.dataset.readers import read_record
from tiny_parts import tiny_overrides, write_tiny_parts

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PREPARE = sorted([*ROOT.glob("data/*/prepare.md"), *ROOT.glob("data/*/*/prepare.md"),
                  *ROOT.glob("data/*/*/*/prepare.md")])  # fmt: skip
DOCUMENTS = [*READMES, *PREPARE, ROOT / "data/embed/README.md", *ROOT.glob("ckpt/*/*.md")]
CAPTION_FILES = {  # what each snippet finds, and the one row it makes of it
    "cc3m": (
        {"images/00000/000000012.jpg": "", "images/00000/000000012.txt": "a boat\n"},
        {"image_name": "00000/000000012.jpg", "caption": "a boat"},
    ),
    "webvid": (
        {
            "videos/1_50/7.mp4": "",
            "results_2M_train.csv": "videoid,contentUrl,duration,page_dir,name\n"
            '7,u,PT1S,1_50,"waves, foam"\n8,u,PT1S,1_50,gone\n',
        },
        {"video_name": "1_50/7.mp4", "caption": "waves, foam"},
    ),
    "audiocap": (
        {
            "audios/abc.wav": "",
            "train.csv": "audiocap_id,youtube_id,start_time,caption\n1,abc,0,ducks\n2,no,0,gone\n",
        },
        {"audio_name": "abc.wav", "caption": "ducks"},
    ),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[tuple[Path, list[str]]]:
    """(current folder, words) of every command in the document's bash blocks."""
    found = []
    for block in blocks(document, "bash"):
        folder = ROOT
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["cd"]:
                folder = (folder / words[1]).resolve()
            elif words:
                found.append((folder, words))
    return found


def program(folder: Path, words: list[str]) -> tuple[Path, list[str]]:
    """The file that a command runs, and its arguments."""
    if words[0] == "torchrun" or words[0] == "deepspeed":
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return folder / words[at], words[at + 1 :]
    assert words[0] in ("bash", "python"), f"unknown command {words[0]}"
    if words[1] == "-m":
        return folder / (words[2].replace(".", "/") + ".py"), words[3:]
    return folder / words[1], words[2:]


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """What flags a program takes, as its own `--help` says."""

    def ask(file: Path) -> set[str]:
        if file.suffix == ".sh":
            own = set(re.findall(r"--\w+", file.read_text()))
            behind = {"train.sh": "code/train.py", "app.sh": "code/demo_app.py"}.get(file.name)
            return own | (ask(ROOT / behind) if behind else set())
        monkeypatch.setattr(sys, "argv", [str(file), "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(file), run_name="__main__")
        return set(re.findall(r"--[\w-]+", capsys.readouterr().out))

    return ask


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_command_runs_a_file_that_is_there_with_flags_that_it_takes(
    document: Path, help_of: Callable
) -> None:
    known: dict[Path, set[str]] = {}
    for folder, words in commands(document):
        file, arguments = program(folder, words)
        assert file.is_file(), words
        if flags(arguments):
            if file not in known:
                known[file] = help_of(file)
            assert flags(arguments) <= known[file], words


def test_every_flag_named_in_the_readmes_is_some_programs(help_of: Callable) -> None:
    programs = [
        ROOT / name
        for name in (
            "code/inference.py", "code/process_embeddings.py", "code/dataset/preprocess_dataset.py",
            "code/mini_world/write_data.py", "code/mini_world/build_components.py",
            "code/evaluate.py",
            "code/evaluate_parts.py", "code/prepare_checkpoints.py", "code/merge_vicuna.py",
            "code/check_data.py", "scripts/train.sh", "scripts/app.sh", "scripts/test.sh",
            "benchmarks/gpu.py",
        )
    ]  # fmt: skip
    known = {"--help"}.union(*(help_of(file) for file in programs))
    for readme in READMES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme.read_text(encoding="utf-8")))
        assert named - known - {"--logdir"} == set()  # TensorBoard's


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_configuration_named_in_a_command_loads(document: Path) -> None:
    for _, words in commands(document):
        options = dict(pairwise(words))
        overrides = [after for word, after in pairwise(words) if word == "--set"]
        stage = int(options["--stage"]) if "--stage" in options else None
        load_config(options.get("--config", "mini"), stage, overrides)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_relative_link_resolves(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_both_readmes_have_the_same_commands_and_sections() -> None:
    for language in ("bash", "python"):
        without_comments = [
            [re.sub(r"\s*#.*", "", block) for block in blocks(readme, language)]
            for readme in READMES
        ]
        assert without_comments[0] == without_comments[1]
    count = [len(re.findall(r"^## ", r.read_text(encoding="utf-8"), re.MULTILINE)) for r in READMES]
    assert count[0] == count[1]


def test_the_readmes_python_uses_what_there_is() -> None:
    for block in blocks(READMES[0], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_readmes_python_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Both blocks with the assistant, in a folder with the image and on tiny components."""
    write_tiny_parts(tmp_path)
    config = load_config("7b", overrides=tiny_overrides(tmp_path))
    monkeypatch.setattr(nextgpt, "load_config", {"mini": config}.__getitem__, raising=False)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("triangle.png")
    names: dict[str, Any] = {}
    used = [block for block in blocks(READMES[0], "python") if "assistant" in block]
    assert len(used) == 2 and len(used[0].split("\n\n")[1].splitlines()) == 2
    exec(compile("".join(used), "README.md", "exec"), names)
    assert (tmp_path / "outputs/flute/history.json").is_file()
    assert "AnswerComplete(" in capsys.readouterr().out
    assert len(names["turns"]) == 3


def test_every_data_set_of_the_course_has_its_document() -> None:
    described = {document.parent for document in PREPARE}
    wanted = {
        (ROOT / "data" / entry.annotation).parent
        for name, entry in CATALOG.items()
        if not name.startswith("mini_")
    }
    assert described == wanted


@pytest.mark.parametrize("document", PREPARE, ids=name_of)
def test_every_example_record_is_read_as_its_data_set(document: Path, tmp_path: Path) -> None:
    sets = {
        name: entry
        for name, entry in CATALOG.items()
        if (ROOT / "data" / entry.annotation).parent == document.parent
    }
    text = document.read_text(encoding="utf-8")
    assert blocks(document, "json")
    for name, entry in sets.items():
        assert name in text or name.replace("_dec", "_enc") in text
        assert Path(entry.annotation).name in text
        for block in blocks(document, "json"):
            for row, record in enumerate(json.loads(block)):
                read_record(record, entry.kind, document, row)


@pytest.mark.parametrize("kind", ["alpaca", "llava", "videochat"])
def test_a_raw_example_becomes_the_example_beside_it(kind: str, tmp_path: Path) -> None:
    document = ROOT / "data/IT_data/T+X-T_data" / kind / "prepare.md"
    raw, output = tmp_path / "raw.json", tmp_path / "out.json"
    raw.write_text(blocks(document, "json raw")[0])
    preprocess(kind, raw, output)
    made = [record for record, _ in iter_rows(output)]
    assert made == json.loads(blocks(document, "json")[0])


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_a_caption_snippet_lists_the_media_that_are_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, row = CAPTION_FILES[name]
    folder = tmp_path / "data/T-X_pair_data" / name
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks(ROOT / "data/T-X_pair_data" / name / "prepare.md", "python")
    exec(compile(snippet, name, "exec"), {})
    assert json.loads((folder / f"{name}.json").read_text()) == [row]
