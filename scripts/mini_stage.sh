#!/usr/bin/env bash
# Trains a stage of the mini system and validates it four times on 4 % of the rows, at most 48:
# bash scripts/mini_stage.sh STAGE [arguments of train.sh]
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
stage=$1
validate_steps=([1]=5 [2]=25 [3]=55 [4]=126)
processes=()
if ! has_gpu && [ "$(nproc)" -ge 2 ]; then
    processes=(--include localhost:0,1) # two processes of one core are faster than one of two
fi
bash "$root/scripts/train.sh" --stage "$stage" --resume ${processes[@]+"${processes[@]}"} \
    --set data.validation.share=0.04 --set data.validation.max_samples=48 \
    --set training.validate_steps="${validate_steps[$stage]}" "${@:2}"
