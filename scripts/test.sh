#!/usr/bin/env bash
# Installs the requirements, checks the style and runs the tests; arguments go to pytest.
#   bash scripts/test.sh -m slow     the tests that take minutes
#   bash scripts/test.sh --browser   the tests that drive the web page with Chromium
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH"
if [ "${1:-}" = --browser ]; then
    shift
    exec python -m pytest -m "browser and not slow" "$@"
fi
ruff check .
ruff format --check .
python -m pytest "$@"
