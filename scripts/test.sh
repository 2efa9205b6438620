#!/usr/bin/env bash
# Installs the requirements, checks the style and runs the tests; arguments go to pytest.
#   bash scripts/test.sh -m slow     the tests that take minutes
#   bash scripts/test.sh --browser   the tests that drive the web page with Chromium
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
cd "$root"
bash scripts/install.sh
use_python
if [ "${1:-}" = --browser ]; then
    shift
    exec python -m pytest -m "browser and not slow" "$@"
fi
ruff check .
ruff format --check .
python -m pytest "$@"
