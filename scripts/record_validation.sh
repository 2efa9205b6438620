#!/usr/bin/env bash
# Records code/mini_world/validation_curve.json, the held-out losses that the quickstart compares
# with: its stages with three seeds, after its data and caption embeddings are there. Takes three
# times as long as the stages of the quickstart. Run again after an interruption, it resumes.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
cd "$root"
use_python
export OMP_WAIT_POLICY=passive
runs=outputs/validation_curve
for seed in 0 1 2; do
    for stage in 1 2 3 4; do
        bash scripts/mini_stage.sh $stage --save_path $runs/seed_$seed --set training.seed=$seed
    done
done
python -m nextgpt.mini_world.validation_curve $runs/seed_* --record code/mini_world/validation_curve.json
