#!/usr/bin/env bash
# Trains the mini world's frozen components from scratch, replaces those in ckpt/pretrained_ckpt and
# evaluates them. Run again after an interruption, it resumes from its checkpoints in ckpt/build.
#   bash scripts/build_mini.sh [--only PART ...]     PART: encoder image video audio language_model
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
cd "$root"
bash scripts/install.sh
use_python
python -m nextgpt.mini_world.build_components --rebuild "$@"
python code/evaluate_parts.py
