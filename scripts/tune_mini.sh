#!/usr/bin/env bash
# Makes tuned parameters to ship (ckpt/delta_ckpt/nextgpt/mini_tiva_v0): the quickstart's stages with
# more steps and three times the data, the third of them twice, the second time on other data.
# Started again, it goes on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/code" OMP_WAIT_POLICY=passive
tuned=ckpt/delta_ckpt/nextgpt/mini_tiva_v0
first=ckpt/build/tuning_1 # stages 1 to 3
second=ckpt/build/tuning_2 # stages 3 and 4

for seed in 0 1; do
    python -m mini_world.write_data --out data/tuning/$seed/mini_world --scale 3 --seed $seed
    bash scripts/embed_mini.sh data/tuning/$seed/mini_world
done
python -m mini_world.write_data --out data/mini_world
bash scripts/embed_mini.sh

train() { # stage, folder, settings
    bash scripts/train.sh --stage "$1" --resume --save_path "$2" "${@:3}"
}
world() { # seed
    printf '%s\n' --set data.root=data/tuning/$1 --set data.embeddings=data/tuning/$1/mini_world/embed
}
mapfile -t one < <(world 0)
mapfile -t other < <(world 1)
slowly=(--set training.learning_rate=1.5e-3 --set training.warmup=0.04)
train 1 $first "${one[@]}"
train 2 $first "${one[@]}" --set training.max_steps=200
train 3 $first "${one[@]}" "${slowly[@]}" --set training.max_steps=500
train 3 $second "${other[@]}" "${slowly[@]}" --set training.max_steps=600 --init-from $first/stage_3
train 4 $second --set training.max_steps=1200 --set 'data.datasets=[mini_request, mini_mosit]'
python code/convert_delta.py $second/stage_4 $tuned
