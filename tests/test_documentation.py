"""Documents agree with the code: commands, flags, paths, keys, links, formats, snippets; README and
course page are the same in both languages.
"""

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

import pytest

from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.dataset.catalog import CATALOG
from nextgpt.dataset.json_stream import iter_rows
from nextgpt.dataset.readers import Kind, read_record
from nextgpt.tools import preprocess_dataset
from nextgpt.tools.preprocess_dataset import preprocess

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
COURSE = [ROOT / "docs/course.md", ROOT / "docs/course.zh-CN.md"]
DOCS = sorted(ROOT.glob("docs/*.md"))
WRITTEN_DOCS = [document for document in DOCS if document.name != "configuration.md"]  # generated
PREPARE = sorted([*ROOT.glob("data/*/prepare.md"), *ROOT.glob("data/*/*/prepare.md"),
                  *ROOT.glob("data/*/*/*/prepare.md")])  # fmt: skip
DOCUMENTS = [
    *READMES, *DOCS, *PREPARE, ROOT / "data/embed/README.md", *sorted(ROOT.glob("ckpt/*/*.md")),
    ROOT / "tests/parity/README.md",
]  # fmt: skip
PROGRAMS = [
    *(f"code/{name}.py" for name in (
        "train", "inference", "demo_app", "evaluate", "evaluate_parts", "process_embeddings",
        "process_features",
        "check_data", "prepare_checkpoints", "merge_vicuna", "convert_delta",
        "dataset/preprocess_dataset", "mini_world/write_data", "mini_world/build_components",
    )),
    "benchmarks/gpu.py", "benchmarks/features.py", "benchmarks/decoding.py",
    "benchmarks/serving.py", "scripts/train.sh", "scripts/app.sh", "scripts/test.sh",
]  # fmt: skip
OTHERS_FLAGS = {  # of every program, TensorBoard, git, torchrun, srun
    "--help", "--logdir", "--depth", "--nproc_per_node", "--gpus-per-task",
}  # fmt: skip
# Roots of paths in the documents. Data, weights and outputs are not in the repository.
TRACKED_ROOTS = ("code", "scripts", "tests", "benchmarks", "docs", "assets")
THE_COURSES_FILES = {  # named in the course page's left column
    "code/model/anyToImageVideoAudio.py", "code/model/layers.py", "code/model/ImageBind",
    "code/model/agent.py", "code/model/custom_sd.py", "code/model/custom_vd.py",
    "code/model/custom_ad.py",
}  # fmt: skip
CAPTION_FILES = {  # what each command finds, and the one row it makes of it
    "cc3m": (
        {
            "images/00000/000000000.jpg": "",
            "images/00000/000000000.txt": "a boat\n",
            "Train_GCC-training.tsv": "a boat\thttp://u/0\ngone\thttp://u/1\n",
        },
        {"image_name": "00000/000000000.jpg", "caption": "a boat"},
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
        {"audio_name": "abc.wav", "caption": "ducks", "embedding_name": "abc.wav.1"},
    ),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def without_blocks(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def sections_of(document: Path) -> list[str]:
    """The text before the first heading of level 2, and each section, without blocks."""
    return re.split(r"^## ", without_blocks(document), flags=re.MULTILINE)


def numbers_in(text: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def links_in(text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)]+)\)", text)
    return sorted(target.replace(".zh-CN", "") for target in targets)


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
        inner = words[2].removeprefix("nextgpt.").replace(".", "/")
        return ROOT / "code" / f"{inner}.py", words[3:]
    return folder / words[1], words[2:]


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Return the flags in a program's `--help`."""

    def ask(file: Path) -> set[str]:
        if file.suffix == ".sh":
            own = set(re.findall(r"--\w+", file.read_text()))
            behind = {"train.sh": "code/train.py", "app.sh": "code/demo_app.py"}.get(file.name)
            return own | (ask(ROOT / behind) if behind else set())
        monkeypatch.setattr(sys, "argv", [str(file), "--help"])
        if file.parent.name == "benchmarks":  # they import each other
            monkeypatch.syspath_prepend(str(file.parent))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(file), run_name="__main__")
        assert ended.value.code == 0
        return set(re.findall(r"--[\w-]+", capsys.readouterr().out))

    return ask


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_run_existing_programs_with_valid_flags(document: Path, help_of: Callable) -> None:
    known: dict[Path, set[str]] = {}
    for folder, words in commands(document):
        file, arguments = program(folder, words)
        assert file.is_file(), words
        if flags(arguments):
            if file not in known:
                known[file] = help_of(file)
            assert flags(arguments) <= known[file], words


def test_flags_in_documents_belong_to_a_program(help_of: Callable) -> None:
    known = OTHERS_FLAGS.union(*(help_of(ROOT / name) for name in PROGRAMS))
    named = {
        document: set(re.findall(r"(?<![\w-])--[a-z][\w-]*", without_blocks(document)))
        for document in (*READMES, *DOCS)
    }
    assert all(named[readme] for readme in READMES)
    for document, flags_in_prose in named.items():
        assert flags_in_prose <= known, document


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_configs_in_commands_load(document: Path) -> None:
    for _, words in commands(document):
        options = dict(pairwise(words))
        overrides = [after for word, after in pairwise(words) if word == "--set"]
        stage = int(options["--stage"]) if "--stage" in options else None
        load_config(options.get("--config", "mini"), stage, overrides)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_and_anchors_resolve(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("document", [*READMES, *DOCS], ids=name_of)
def test_paths_in_documents_exist(document: Path) -> None:
    """Paths from the root: those in prose, of programs in its commands, and of the tests."""
    text = document.read_text(encoding="utf-8")
    roots = "|".join(TRACKED_ROOTS)
    for path in set(re.findall(rf"(?<![\w/.-])(?:{roots})/[\w./+-]*\w", text)):
        assert path in THE_COURSES_FILES or (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m nextgpt\.([\w.]+)", text)):
        assert (ROOT / "code" / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("document", [*READMES, *WRITTEN_DOCS], ids=name_of)
def test_config_keys_in_prose_exist(document: Path) -> None:
    config = load_config("7b", 1).model_dump()
    sections = "|".join(name for name, value in config.items() if isinstance(value, dict))
    for key in set(re.findall(rf"`((?:{sections})\.[a-z_.0-9]+)", without_blocks(document))):
        value: object = config
        for name in key.split("."):
            if (ROOT / "code" / key).exists() or key.endswith((".json", ".yaml")):
                break
            assert isinstance(value, dict) and name in value, key
            value = value[name]


def test_troubleshooting_messages_are_in_the_code() -> None:
    files = [*ROOT.glob("code/**/*.py"), *ROOT.glob("scripts/*.sh")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    source = re.sub(r'"\s*f?"', "", source)  # literals that are continued on the next line
    rows = re.findall(
        r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 5
    for message in (row.split("`")[1] for row in rows):
        for fragment in filter(None, (part.strip() for part in message.split("…"))):
            assert fragment in source, message


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_readme_is_short_and_links_every_page(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert commands(readme) and blocks(readme, "python")
    pages = {name_of(page).replace(".zh-CN", "") for page in DOCS}
    assert pages <= {target.partition("#")[0] for target in links_in(text)}


@pytest.mark.parametrize("pair", [READMES, COURSE], ids=["readme", "course"])
def test_translations_have_the_same_sections_commands_links_and_numbers(pair: list[Path]) -> None:
    for language in ("bash", "python"):
        assert blocks(pair[0], language) == blocks(pair[1], language)
    english, chinese = (sections_of(document) for document in pair)
    assert len(english) == len(chinese)
    for one, other in zip(english, chinese, strict=True):
        assert numbers_in(one) == numbers_in(other), one[:40]
        assert links_in(one) == links_in(other), one[:40]
        assert len(re.findall(r"^\|", one, re.MULTILINE)) == len(
            re.findall(r"^\|", other, re.MULTILINE)
        ), one[:40]


def test_python_snippets_use_existing_names() -> None:
    for block in [block for document in (*READMES, *DOCS) for block in blocks(document, "python")]:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_import_paths_are_set_nowhere() -> None:
    """The package is installed; only tests' child processes need a path, to the tests' helpers."""
    word = re.compile("PYTHON" + "PATH|sys" + r"\.path\b")
    files = [*DOCUMENTS, *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]
    files += [f for room in ("code", "tests", "benchmarks") for f in ROOT.glob(f"{room}/**/*.py")]
    found = [
        name_of(file)
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if word.search(line)
    ]
    assert found == ["tests/conftest.py"]


def test_data_sets_of_the_course_are_documented() -> None:
    described = {document.parent for document in PREPARE}
    wanted = {
        (ROOT / "data" / entry.annotation).parent
        for name, entry in CATALOG.items()
        if not name.startswith("mini_")
    }
    assert described == wanted


@pytest.mark.parametrize("document", PREPARE, ids=name_of)
def test_example_records_are_readable(document: Path, tmp_path: Path) -> None:
    sets = {
        name: entry
        for name, entry in CATALOG.items()
        if (ROOT / "data" / entry.annotation).parent == document.parent
    }
    assert sets
    text = document.read_text(encoding="utf-8")
    for name, entry in sets.items():
        assert name in text or name.replace("_dec", "_enc") in text
        assert Path(entry.annotation).name in text
    main, *others = [json.loads(block) for block in blocks(document, "json")]
    assert set(sets) == {name for name in sets if reads_all(main, sets[name].kind, document)}
    for records in others:  # of one stage's file
        assert any(reads_all(records, entry.kind, document) for entry in sets.values()), records


def reads_all(records: list[dict], kind: Kind, document: Path) -> bool:
    try:
        for row, record in enumerate(records):
            read_record(record, kind, document, row)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("kind", ["alpaca", "llava", "videochat"])
def test_raw_examples_convert_to_the_documented_rows(kind: str, tmp_path: Path) -> None:
    document = ROOT / "data/IT_data/T+X-T_data" / kind / "prepare.md"
    raw, output = tmp_path / "raw.json", tmp_path / "out.json"
    raw.write_text(blocks(document, "json raw")[0])
    preprocess(kind, raw, output)
    made = [record for record, _ in iter_rows(output)]
    assert made == json.loads(blocks(document, "json")[0])


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_conversion_commands_list_the_existing_media(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, row = CAPTION_FILES[name]
    folder = tmp_path / "data/T-X_pair_data" / name
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    document = ROOT / "data/T-X_pair_data" / name / "prepare.md"
    (words,) = (w for _, w in commands(document) if "preprocess_dataset.py" in w[1])
    monkeypatch.setattr(sys, "argv", words[1:])
    preprocess_dataset.main()
    assert json.loads((folder / f"{name}.json").read_text()) == [row]
