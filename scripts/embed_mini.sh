#!/usr/bin/env bash
# Computes the caption embeddings of a mini world: bash scripts/embed_mini.sh [FOLDER]
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
cd "$root"
use_python
world=${1:-data/mini_world}
instructions=$world/IT_data
embed() { # modality, decoder
    python code/process_embeddings.py "$world/T-X_pair_data/$1/$1.json" \
        "$instructions/T-T+X_data/mini_request/mini_request.json" \
        "$instructions/MosIT_data/mini_mosit/mini_mosit.json" "$1" "$world/embed" \
        "ckpt/pretrained_ckpt/$2" --replace
}
embed image mini_stable_diffusion &
image_job=$!
embed video mini_zeroscope
embed audio mini_audioldm
wait $image_job
