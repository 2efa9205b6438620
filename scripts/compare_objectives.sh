#!/usr/bin/env bash
# Compares losses of the output projections in the mini world (docs/objective.md): caption alignment,
# latent denoising through the decoders, and both. Each trains the quickstart's stages 2 to 4 from one
# first stage; then the scoreboard judges media of requests in text. Arguments go to train.sh:
# bash scripts/compare_objectives.sh --include localhost:0,1
# Run again after an interruption, it resumes.
set -euo pipefail
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
bash scripts/install.sh
export PATH="$root/.venv/bin:$PATH" OMP_WAIT_POLICY=passive
runs=outputs/objectives

python -m nextgpt.mini_world.write_data --out data/mini_world
python -m nextgpt.mini_world.render_answers --world data/mini_world
bash scripts/embed_mini.sh
bash scripts/train.sh --stage 1 --resume --save_path $runs/common "$@"
no_alignment=(--set 'training.alignment_loss_weights={image: 0, video: 0, audio: 0}')
denoising=(--set 'training.denoising_loss_weights={image: 1, video: 1, audio: 1}')
for objective in alignment denoising both; do
    case $objective in
    alignment) losses=() ;;
    denoising) losses=("${no_alignment[@]}" "${denoising[@]}") ;;
    both) losses=("${denoising[@]}") ;;
    esac
    first=(--init-from $runs/common/stage_1/delta.safetensors)
    for stage in 2 3 4; do
        bash scripts/train.sh --stage $stage --resume --save_path $runs/$objective \
            "${first[@]}" "${losses[@]}" "$@"
        first=()
    done
    python code/evaluate.py --delta $runs/$objective/stage_4 --cells T-I,T-V,T-A --samples 40 \
        --out $runs/$objective/scoreboard
done
