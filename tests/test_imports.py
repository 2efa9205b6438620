"""Imports run downwards between the rooms of code/; the 7B system never loads the mini world."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tiny_components import tiny_overrides, write_tiny_components
from tiny_run import TinyRun

CODE = Path(__file__).resolve().parent.parent / "code"

# Lowest first. A room imports itself and lower layers; rooms of one layer never import each other.
# The files directly in code/, the command-line entries, are above all of them.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("common",),
    ("config",),
    ("conversation",),
    ("media",),
    ("dataset",),
    ("model",),
    ("decoders",),
    ("training", "generation"),
    ("evaluation",),
    ("callbacks",),
    ("tools",),
    ("serving",),
    ("mini_world",),
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
ENTRY_LAYER = len(LAYERS)

# Entries that evaluate the mini world; the other entries serve the 7B system too.
MINI_WORLD_ENTRIES = {"evaluate.py", "evaluate_parts.py"}

# The course's path of a command that lies in a higher room: (file, imported room).
ENTRIES_IN_ROOMS = {("dataset/preprocess_dataset.py", "tools")}


class Import(NamedTuple):
    """One import of a room or entry of the package."""

    file: str  # relative to code/
    line: int
    module: str
    room: str  # of what is imported; an entry's name for an entry

    def __str__(self) -> str:
        return f"code/{self.file}:{self.line} imports {self.module}"


def package_imports(root: Path) -> Iterator[Import]:
    """All imports of the package's own modules in the files below `root`, also within functions."""
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        package = ("nextgpt", *file.parent.parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in imported_modules(node, package):
                name, *inner = module.split(".")
                if name == "nextgpt" and inner:
                    yield Import(file.as_posix(), node.lineno, module, inner[0])


def imported_modules(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Absolute names of what an import statement loads; empty for other statements."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parents = package[: len(package) - node.level + 1] if node.level else ()
    module = ".".join((*parents, *filter(None, [node.module])))
    if module == "nextgpt":
        return [f"{module}.{alias.name}" for alias in node.names]
    return [module]


def upward_imports(root: Path) -> list[Import]:
    """Imports of a higher layer, or of another room of the same layer."""
    return [one for one in package_imports(root) if is_upward(one)]


def is_upward(one: Import) -> bool:
    room, *inner = one.file.split("/")
    if not inner:
        return False
    layer, imported = LAYER_OF[room], LAYER_OF.get(one.room, ENTRY_LAYER)
    return one.room != room and imported >= layer


def test_rooms_all_have_a_layer() -> None:
    rooms = {path.relative_to(CODE).parts[0] for path in CODE.rglob("*.py") if path.parent != CODE}
    assert rooms == set(LAYER_OF)


def test_wheel_contains_every_folder_with_files() -> None:
    """The editable installation finds folders that pyproject.toml lacks; a wheel does not."""
    suffixes = {".py", ".yaml", ".json"}
    folders = {path.parent for path in CODE.rglob("*") if path.suffix in suffixes}
    names = {".".join(("nextgpt", *folder.relative_to(CODE).parts)) for folder in folders}
    settings = tomllib.loads((CODE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings["tool"]["setuptools"]["packages"]) == names


def test_imports_run_downwards() -> None:
    upward = upward_imports(CODE)
    unknown = [str(one) for one in upward if (one.file, one.room) not in ENTRIES_IN_ROOMS]
    assert not unknown, unknown[0]
    removed = ENTRIES_IN_ROOMS - {(one.file, one.room) for one in upward}
    assert not removed, removed


def test_mini_world_is_imported_by_its_entries_only() -> None:
    entries = {one.file for one in package_imports(CODE) if one.room == "mini_world"}
    assert {file for file in entries if "/" not in file} == MINI_WORLD_ENTRIES


HELP = """
import contextlib, importlib, io, sys
with contextlib.redirect_stdout(io.StringIO()):
    for entry in sys.argv[1].split():
        sys.argv = [entry, "--help"]
        with contextlib.suppress(SystemExit):
            importlib.import_module("nextgpt." + entry).main()
heavy = {"torch", "transformers", "gradio", "fastapi", "PIL", "av", "deepspeed"}
print(*sys.modules.keys() & heavy)
"""


def test_help_of_the_entries_loads_no_heavy_library() -> None:
    entries = [path.stem for path in CODE.glob("*.py") if path.stem != "__init__"]
    assert {"train", "inference", "demo_app"} <= set(entries)
    command = [sys.executable, "-c", HELP, " ".join(entries)]
    assert subprocess.check_output(command, text=True).strip() == ""


def test_importing_the_libraries_of_training_prints_nothing() -> None:
    command = [sys.executable, "-c", "import nextgpt.training.engine, nextgpt.decoders.pipelines"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


LOADER = """
import sys
import nextgpt.training.data, nextgpt.training.feature_caches
heavy = {"transformers.modeling_utils", "peft", "diffusers", "bitsandbytes", "deepspeed"}
print(*sys.modules.keys() & heavy)
"""


def test_loader_processes_load_no_library_of_models() -> None:
    command = [sys.executable, "-c", LOADER]  # each process would have 160 MB more
    assert subprocess.check_output(command, text=True).strip() == ""


@pytest.mark.parametrize(
    ("file", "statement", "imported"),
    [
        ("model/a.py", "from nextgpt.training.trainer import Trainer", "nextgpt.training.trainer"),
        ("model/a.py", "import nextgpt.serving.server", "nextgpt.serving.server"),
        ("model/a.py", "from nextgpt import tools", "nextgpt.tools"),
        ("model/a.py", "from nextgpt import train", "nextgpt.train"),
        ("model/inner/a.py", "from ...training import data", "nextgpt.training"),
        ("training/a.py", "from nextgpt.generation.cli import main", "nextgpt.generation.cli"),
        ("config/a.py", "def f():\n    from nextgpt.model import b", "nextgpt.model"),
    ],
)
def test_import_checker_finds_upward_imports(
    file: str, statement: str, imported: str, tmp_path: Path
) -> None:
    files = {
        file: statement,
        "train.py": "from nextgpt.mini_world import words",  # entries may
        "serving/b.py": "import os\nfrom nextgpt.serving import c\nfrom nextgpt.common import io",
        "training/b.py": "from . import data\nfrom ..model import build",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (found,) = upward_imports(tmp_path)
    line = statement.count("\n") + 1
    assert str(found) == f"code/{file}:{line} imports {imported}"


# Runs an entry where the mini world cannot be imported, and serving where nothing is waited for.
WITHOUT_MINI_WORLD = """
import sys
from importlib import import_module

import uvicorn


class NoMiniWorld:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("nextgpt.mini_world"):
            raise AssertionError(f"imported: {name}")


sys.meta_path.insert(0, NoMiniWorld())
uvicorn.Server.run = lambda self, sockets: print("the server runs")
from nextgpt.common.cli import run_cli

entry = sys.argv.pop(1)
run_cli(import_module(f"nextgpt.{entry}").main)
"""


def run_without_mini_world(entry: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code/<entry>.py` where importing the mini world fails."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_MINI_WORLD, entry, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_import_hook_blocks_the_mini_world() -> None:
    done = run_without_mini_world("evaluate_parts", "--help")
    assert done.returncode != 0 and "imported: nextgpt.mini_world" in done.stderr


def test_protocols_run_without_the_mini_world(tmp_path: Path) -> None:
    done = run_without_mini_world(
        "evaluate",
        "--config",
        "7b",
        "--protocol",
        "coco_captions",
        "--data",
        str(tmp_path / "none"),
    )
    assert done.returncode == 2 and "does not exist" in done.stderr


def test_prepare_checkpoints_runs_without_the_mini_world() -> None:
    done = run_without_mini_world("prepare_checkpoints", "--config", "7b")
    assert "Traceback" not in done.stderr and "language_model" in done.stdout, done.stderr


def test_memory_estimate_runs_without_the_mini_world(tmp_path: Path) -> None:
    done = run_without_mini_world("train", *TinyRun(tmp_path, 1).arguments, "--plan")
    assert done.returncode == 0 and "GB" in done.stdout, done.stderr


def test_training_runs_without_the_mini_world(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, 1, sets=["training.max_steps=2"])
    done = run_without_mini_world("train", *run.arguments)
    assert done.returncode == 0, done.stderr
    assert len(run.losses) == 2 and run.delta


def test_server_starts_without_the_mini_world(tmp_path: Path) -> None:
    write_tiny_components(tmp_path)
    sets = [word for override in tiny_overrides(tmp_path) for word in ("--set", override)]
    delta = str(tmp_path / "tuned" / "stage_3")
    where = ("--nextgpt_ckpt_path", delta, "--server_port", "0")
    done = run_without_mini_world("demo_app", "--config", "7b", *sets, *where)
    assert done.returncode == 0 and "the server runs" in done.stdout, done.stderr
