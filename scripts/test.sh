#!/usr/bin/env bash
# Installs what is needed, checks the style and runs the tests; arguments go to pytest
# (bash scripts/test.sh -m slow: the ones that take minutes).
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH"
ruff check .
ruff format --check .
python -m pytest "$@"
