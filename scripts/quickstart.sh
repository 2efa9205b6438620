#!/usr/bin/env bash
# From a fresh clone to answers: installs, answers the course's four cases with the shipped parameters,
# renders the mini world's data, computes the caption embeddings, trains all stages and compares their
# held-out losses with recorded ones, answers the cases with the trained parameters and evaluates
# answers on held-out objects. The results are in outputs/quickstart/report.html. Run again after an
# interruption, it resumes. Exit code 3: an answer to one of the four cases lacks a medium.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
cd "$root"
started=$SECONDS
step() { printf '\n== %s (%d s) ==\n' "$1" $((SECONDS - started)); }

step "installing"
bash scripts/install.sh
use_python
export OMP_WAIT_POLICY=passive
world=data/mini_world
out=outputs/quickstart
run=ckpt/delta_ckpt/nextgpt/mini_tiva_v0
status=0

answer() { # folder, arguments of inference.py
    local code=0
    python code/inference.py --cases code/mini_world/demo_examples/cases.json --out "$@" || code=$?
    case $code in 0) ;; 3) status=3 ;; *) exit $code ;; esac
    python -m nextgpt.mini_world.quickstart_report $out
}

step "the course's four cases, answered by the shipped parameters"
answer $out/shipped --nextgpt_ckpt_path $run/delta.safetensors
printf '%s\n' "Open $out/report.html to see and hear them. What follows trains such parameters."

step "data of the mini world"
python -m nextgpt.mini_world.write_data --out $world

step "caption embeddings"
bash scripts/embed_mini.sh $world

for stage in 1 2 3 4; do
    step "training stage $stage"
    bash scripts/mini_stage.sh $stage
    python -m nextgpt.mini_world.validation_curve $run --stage $stage
done

step "the course's four cases, answered by the trained parameters"
answer $out/trained
step "scoreboard"
python code/evaluate.py --cells quick --samples 20 --out $out/scoreboard
step "the four cases, 40 of each"
python code/evaluate.py --cells cases --samples 40 --out $out/cases
python -m nextgpt.mini_world.quickstart_report $out
step "done"
exit $status
