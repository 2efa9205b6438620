#!/usr/bin/env bash
# From a fresh clone to answers: installs, renders the mini world's data, computes the caption
# embeddings, trains all stages and compares their held-out losses with recorded ones, answers the
# course's four cases and evaluates the answers on held-out objects. Run again after an interruption,
# it resumes.
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
started=$SECONDS
step() { printf '\n== %s (%d s) ==\n' "$1" $((SECONDS - started)); }

step "installing"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH" OMP_WAIT_POLICY=passive
world=data/mini_world

step "data of the mini world"
python -m nextgpt.mini_world.write_data --out $world

step "caption embeddings"
bash scripts/embed_mini.sh $world

for stage in 1 2 3 4; do
    step "training stage $stage"
    bash scripts/mini_stage.sh $stage
    python -m nextgpt.mini_world.validation_curve ckpt/delta_ckpt/nextgpt/mini_tiva_v0 --stage $stage
done

step "the course's four cases"
python code/inference.py --cases $world/examples/cases.json --out outputs/quickstart
step "scoreboard"
python code/evaluate.py --cells quick --samples 20 --out outputs/quickstart/scoreboard
step "the four cases, 40 of each"
python code/evaluate.py --cells cases --samples 40 --out outputs/quickstart/cases
step "done"
