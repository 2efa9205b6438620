"""The project's root, from which relative paths in the configuration count."""

import os
from pathlib import Path


def _find_root() -> Path:
    """`NEXTGPT_HOME` if it is set; else the checkout; else, of an installed package, here."""
    if home := os.environ.get("NEXTGPT_HOME"):
        return Path(home).resolve()
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


PROJECT_ROOT = _find_root()


def project_path(path: str) -> Path:
    """`path` from the configuration, absolute or relative to the project's root."""
    return PROJECT_ROOT / path
