#!/usr/bin/env bash
# Makes tuned parameters to ship (ckpt/delta_ckpt/nextgpt/mini_tiva_v0): the quickstart's stages with
# more steps, the first three with three times the data.
# Started again, it goes on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/code" OMP_WAIT_POLICY=passive
tuned=ckpt/delta_ckpt/nextgpt/mini_tiva_v0
trials=ckpt/build/tuning # stages 1 to 4
data=data/tuning

python -m mini_world.write_data --out $data/mini_world --scale 3
bash scripts/embed_mini.sh $data/mini_world
python -m mini_world.write_data --out data/mini_world
bash scripts/embed_mini.sh

train() { # stage, its settings
    bash scripts/train.sh --stage "$1" --resume --save_path $trials "${@:2}"
}
large=(--set data.root=$data --set data.embeddings=$data/mini_world/embed)
train 1 "${large[@]}"
train 2 "${large[@]}" --set training.max_steps=200
train 3 "${large[@]}" --set training.max_steps=500 --set training.learning_rate=1.5e-3 \
    --set training.warmup=0.04
train 4
python code/convert_delta.py $trials/stage_4 $tuned
