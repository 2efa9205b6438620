#!/usr/bin/env bash
# Trains the shipped delta (ckpt/delta_ckpt/nextgpt/mini_tiva_v0): the quickstart's stages, with ten
# times the data and seven times the steps in stage 3, requests that are declined, and a phase at a
# low learning rate at its end.
# Arguments go to train.sh: bash scripts/tune_mini.sh --include localhost:0,1
# Run again after an interruption, it resumes.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
cd "$root"
bash scripts/install.sh
use_python
export OMP_WAIT_POLICY=passive
tuned=ckpt/delta_ckpt/nextgpt/mini_tiva_v0
runs=ckpt/build/tuned

python -m nextgpt.mini_world.write_data --out data/mini_world
bash scripts/embed_mini.sh
python -m nextgpt.mini_world.write_data --out data/tuning/mini_world --scale 10 --seed 11 --unsupported 300
# Without unnamed colours: a model trained on them for long omits colours that it never saw on a shape.
# Three tenths of it plain text: with little, plain questions are answered with media.
python -m nextgpt.mini_world.write_data --out data/finishing/mini_world --scale 2 --seed 14 \
    --unnamed_colours 0 --plain_talk 7000 --unsupported 3000

train() { # stage, folder of the runs, arguments
    bash scripts/train.sh --stage "$1" --resume --save_path "$2" "${@:3}"
}
train 1 $runs "$@"
train 2 $runs "$@"
# Captions are embedded online: most of them are used once or never.
train 3 $runs "$@" --set data.data_dir=data/tuning --set data.caption_embeddings=online \
    --set training.max_steps=1500 \
    --set training.learning_rate=1.2e-3 --set training.group_learning_rates.lora_B=1.2e-3
finishing=(--set data.data_dir=data/finishing --set data.caption_embeddings=online)
train 3 $runs/finishing "$@" "${finishing[@]}" --init-from $runs/stage_3/delta.safetensors \
    --set training.max_steps=1000 \
    --set training.learning_rate=6.0e-4 --set training.group_learning_rates.lora_B=6.0e-4
# Dialogues too: captions of requests in text name every attribute, captions of audio inputs do not.
train 4 $runs/finishing "$@" "${finishing[@]}" --set data.datasets=[mini_request,mini_mosit] \
    --set training.epochs=1
python code/convert_delta.py $runs/finishing/stage_4 $tuned
