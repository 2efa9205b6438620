#!/usr/bin/env bash
# Serves the web page: bash scripts/app.sh [arguments of code/demo_app.py]
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
use_python
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads yield the CPU
exec python "$root/code/demo_app.py" "$@"
