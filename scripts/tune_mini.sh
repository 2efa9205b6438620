#!/usr/bin/env bash
# Makes tuned parameters to ship (ckpt/delta_ckpt/nextgpt/mini_tiva_v0): the quickstart's stages with
# more steps and three times the data, the third of them thrice, each time on other data.
# Started again, it goes on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/code" OMP_WAIT_POLICY=passive
tuned=ckpt/delta_ckpt/nextgpt/mini_tiva_v0
runs=ckpt/build/tuned # in its folder N: what was learned from the N-th world

for seed in 0 1 2; do
    python -m mini_world.write_data --out data/tuning/$seed/mini_world --scale 3 --seed $seed
    bash scripts/embed_mini.sh data/tuning/$seed/mini_world
done
python -m mini_world.write_data --out data/mini_world
bash scripts/embed_mini.sh

train() { # stage, world, settings
    bash scripts/train.sh --stage "$1" --resume --save_path $runs/$2 "${@:3}"
}
train_on_world() { # stage, world, settings
    train "$1" "$2" --set data.root=data/tuning/$2 \
        --set data.embeddings=data/tuning/$2/mini_world/embed "${@:3}"
}
train_on_world 1 0
train_on_world 2 0 --set training.max_steps=200
third() { # world, learning rate, steps, settings
    train_on_world 3 "$1" --set training.learning_rate=$2 --set training.warmup=0.04 \
        --set training.max_steps=$3 "${@:4}"
}
third 0 1.5e-3 500
third 1 1.5e-3 600 --init-from $runs/0/stage_3
third 2 1.2e-3 600 --init-from $runs/1/stage_3
train 4 2 --set training.max_steps=1000 --set 'data.datasets=[mini_request, mini_mosit]'
python code/convert_delta.py $runs/2/stage_4 $tuned
