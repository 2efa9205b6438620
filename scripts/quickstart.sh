#!/usr/bin/env bash
# From nothing to an answer: installs, makes the mini world's data, precomputes the caption
# embeddings, trains the stages on this machine, answers the course's four cases and
# measures the answers on things that it never saw.
# Started again, it goes on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
started=$SECONDS
say() { printf '\n== %s (%d s) ==\n' "$1" $((SECONDS - started)); }

say "installing"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH" OMP_WAIT_POLICY=passive
world=data/mini_world

say "data of the mini world"
python -m nextgpt.mini_world.write_data --out $world

say "caption embeddings"
bash scripts/embed_mini.sh $world

places=localhost:0
if [ ! -e /dev/nvidia0 ] && [ "$(nproc)" -ge 2 ]; then
    places=localhost:0,1 # two processes of a core each are faster than one of two cores
fi
for stage in 1 2 3 4; do
    say "training stage $stage"
    bash scripts/train.sh --stage $stage --resume --include $places
done

say "the course's four cases"
python code/inference.py --cases $world/examples/cases.json --out outputs/quickstart
say "scoreboard"
python code/evaluate.py --cells quick --samples 20 --out outputs/quickstart/scoreboard
say "the four cases, 40 of each"
python code/evaluate.py --cells cases --samples 40 --out outputs/quickstart/cases
say "done"
