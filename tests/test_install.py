"""Clones on other systems, and what `install.sh` and the scripts say before they can work."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BARE = "/usr/bin:/bin"  # bash and the usual programs


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """The output of a command, with its exit code at the end."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={"PATH": BARE, "HOME": "/nowhere", "GIT_CONFIG_NOSYSTEM": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return f"{done.stdout}exit code {done.returncode}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts and the files that they need, without an environment."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml", ".gitattributes"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "code").mkdir()
    (folder / "code" / "scripts").symlink_to("../scripts")
    return folder


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A folder with the programs that the scripts need, but no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "head", "grep", "realpath", "setsid"):
        (folder / name).symlink_to(shutil.which(name) or "")
    return folder


def python_in(folder: Path, version: str, *, venv: bool) -> None:
    """A Python that knows its version, and whether it can make environments."""
    program = folder / f"python{version}"
    code = "" if venv else "case $* in *ensurepip*) exit 1 ;; esac\n"
    program.write_text(f"#!/bin/bash\n{code}case $* in *version_info*) echo {version} ;; esac\n")
    program.chmod(0o755)


def test_clone_has_line_feeds_and_notices_missing_symbolic_links(
    checkout: Path, tmp_path: Path
) -> None:
    if shutil.which("git", path=BARE) is None:
        pytest.skip("no git")
    who = ("-c", "user.name=x", "-c", "user.email=x@y")
    for words in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "x")):
        run("git", *words, cwd=checkout)
    as_on_windows = ("-c", "core.autocrlf=true", "-c", "core.symlinks=false")
    clone = tmp_path / "clone"
    assert run("git", *as_on_windows, "clone", "-q", checkout, clone).endswith("exit code 0")
    assert b"\r" not in (clone / "scripts" / "install.sh").read_bytes()
    said = run("bash", clone / "scripts" / "install.sh")
    assert "symbolic links are text files" in said and said.endswith("exit code 2")
    remedy = said.partition("or run: ")[2].partition("\n")[0].replace("*.py", "")
    assert run("bash", "-c", remedy, cwd=clone).endswith("exit code 0")
    assert (clone / "code" / "scripts").is_symlink()


def test_install_asks_for_a_supported_python(checkout: Path, bin_folder: Path) -> None:
    install = ("bash", checkout / "scripts" / "install.sh")
    python_in(bin_folder, "3.10", venv=True)
    said = run(*install, PATH=str(bin_folder))
    assert said.startswith("error: Python 3.11, 3.12 or 3.13 is needed")
    assert said == run(*install, PATH=str(bin_folder), PYTHON=str(bin_folder / "python3.10"))
    python_in(bin_folder, "3.12", venv=False)
    said = run(*install, PATH=str(bin_folder))
    assert "apt install python3.12-venv" in said and said.endswith("\nexit code 2")
    python_in(bin_folder, "3.13", venv=True)
    assert "installing into .venv" in run(*install, PATH=str(bin_folder))


def test_install_clears_the_environment_of_a_moved_checkout(
    checkout: Path, bin_folder: Path
) -> None:
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to("/bin/true")
    (programs / "pip").write_text("#!/another/place/.venv/bin/python\n")
    python_in(bin_folder, "3.11", venv=True)
    install = ("bash", checkout / "scripts" / "install.sh")
    assert "making .venv again" in run(*install, PATH=str(bin_folder))
    (programs / "pip").write_text(f"#!{programs}/python\n")
    assert "making .venv again" not in run(*install, PATH=str(bin_folder))


@pytest.mark.parametrize("script", ["app", "train", "embed_mini", "mini_stage"])
def test_scripts_ask_for_the_installation_first(
    script: str, checkout: Path, bin_folder: Path
) -> None:
    command = ("bash", checkout / "scripts" / f"{script}.sh", "1")
    (bin_folder / "nproc").symlink_to(shutil.which("nproc") or "")
    expected = (
        "error: the package is not installed, or was moved since: run bash scripts/install.sh first"
        "\nexit code 2"
    )
    assert run(*command, PATH=str(bin_folder)) == expected
    (checkout / "code" / "__init__.py").touch()
    (checkout / ".venv").symlink_to(ROOT / ".venv")  # whose package is another checkout's
    assert run(*command, PATH=str(bin_folder)) == expected


def test_debian_test_asks_for_root_and_debootstrap(checkout: Path, bin_folder: Path) -> None:
    said = run("bash", checkout / "scripts" / "test_debian.sh", PATH=str(bin_folder))
    assert said == "error: root and debootstrap are needed: apt install debootstrap\nexit code 2"
