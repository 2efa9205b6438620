#!/usr/bin/env bash
# Trains the mini world's frozen components from scratch, replaces those in ckpt/pretrained_ckpt and
# evaluates them. Run again after an interruption, it resumes from its checkpoints in ckpt/build.
#   bash scripts/build_mini.sh [--only PART ...]     PART: encoder image video audio language_model
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH"
python -m nextgpt.mini_world.build_components --rebuild "$@"
python code/evaluate_parts.py
