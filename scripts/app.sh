#!/usr/bin/env bash
# Serves the web page: bash scripts/app.sh [arguments of code/demo_app.py]
set -euo pipefail
here=$(pwd)
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
if [ -d "$root/.venv" ]; then
    export PATH="$root/.venv/bin:$PATH"
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads yield the CPU
cd "$here"
exec python "$root/code/demo_app.py" "$@"
