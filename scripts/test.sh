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
# Each file in one process: its tests share what they load. A process takes up to 5 GB of memory with
# its children.
by_memory=$(awk '/MemAvailable/ { print int($2 / 5000000) }' /proc/meminfo)
processes=(-n "$(printf '%s\n' 4 "$(nproc)" "$by_memory" | sort -n | head -n 1)" --dist loadfile)
case " $* " in *" slow "*) processes=() ;; esac # they measure times and memory
python -m pytest "${processes[@]}" "$@"
