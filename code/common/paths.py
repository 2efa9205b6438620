"""The project root, the base of relative paths in the configuration."""

import os
from pathlib import Path


def _find_root() -> Path:
    """`NEXTGPT_HOME` if set; else the checkout; else (installed package) the current folder."""
    if home := os.environ.get("NEXTGPT_HOME"):
        return Path(home).resolve()
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


PROJECT_ROOT = _find_root()


def project_path(path: str) -> Path:
    """Resolve a configured path against the project root."""
    return PROJECT_ROOT / path
