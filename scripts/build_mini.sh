#!/usr/bin/env bash
# Trains the mini world's frozen parts from nothing, replaces those in ckpt/pretrained_ckpt, and
# scores them. Stopped and started again, it goes on from its checkpoints in ckpt/build.
#   bash scripts/build_mini.sh [--only PART ...]     PART: encoder image video audio language_model
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH"
python -m nextgpt.mini_world.build_components --rebuild "$@"
python code/evaluate_parts.py
