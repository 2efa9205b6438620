#!/usr/bin/env bash
# Makes tuned parameters to ship (ckpt/delta_ckpt/nextgpt/mini_tiva_v0): the quickstart's stages, but
# the third on ten times the data, and the last two in more steps. What is given goes to train.sh:
# bash scripts/tune_mini.sh --include localhost:0,1
# Started again, it goes on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/code" OMP_WAIT_POLICY=passive
tuned=ckpt/delta_ckpt/nextgpt/mini_tiva_v0
runs=ckpt/build/tuned

python -m mini_world.write_data --out data/mini_world
bash scripts/embed_mini.sh
python -m mini_world.write_data --out data/tuning/mini_world --scale 10 --seed 11

train() { # stage, arguments
    bash scripts/train.sh --stage "$1" --resume --save_path $runs "${@:2}"
}
train 1 "$@"
train 2 "$@"
# Captions are encoded as they come: most of them are read once or never.
train 3 "$@" --set data.root=data/tuning --set data.caption_embeddings=online \
    --set training.max_steps=1500
train 4 "$@" --set 'data.datasets=[mini_request, mini_mosit]' --set training.max_steps=1000
python code/convert_delta.py $runs/stage_4 $tuned
