#!/usr/bin/env bash
# The demo in the browser: bash scripts/app.sh [arguments of code/demo_app.py]
set -euo pipefail
here=$(pwd)
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
if [ -d "$root/.venv" ]; then
    export PATH="$root/.venv/bin:$PATH"
fi
cd "$here"
exec python "$root/code/demo_app.py" "$@"
