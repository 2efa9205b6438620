#!/usr/bin/env bash
# Redoes the measurements of docs/measurements.md that need no GPU, one after the other; run nothing
# else meanwhile. Each output is in outputs/measurements/NAME.txt, with its command, date and machine.
# Outputs that are there are kept: run again after an interruption, it continues.
#   bash scripts/measure.sh [NAME ...]     all, or those of these names
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
cd "$root"
use_python
out=outputs/measurements

measure() { # name, command
    local file=$out/$1.txt
    shift
    [ ! -f "$file" ] || return 0
    echo "$file"
    {
        echo "\$ $*"
        echo "$(date --iso-8601=minutes), commit $(git rev-parse --short HEAD), $(nproc) cores: $(processor | paste --serial --delimiters=" ")"
    } >"$file.partial"
    env "$@" >>"$file.partial" || fail "$* failed: its output is in $file.partial"
    mv "$file.partial" "$file"
}
processor() {
    sed --quiet 's/^model name\s*: //p;T;q' /proc/cpuinfo
    grep --only-matching --word-regexp --extended-regexp 'avx2|avx512f|avx512_bf16|amx_bf16' /proc/cpuinfo |
        sort --unique
}
one=OMP_NUM_THREADS=1
declare -A commands=(
    [index]="python benchmarks/index.py"
    [caption_records]="python benchmarks/caption_records.py"
    [features]="$one python benchmarks/features.py --rounds 15"
    [demo]="python benchmarks/demo.py"
    [decoding_fp32]="$one python benchmarks/decoding.py --precision fp32"
    [decoding]="$one python benchmarks/decoding.py"
    [long_prompts_fp32]="$one python benchmarks/long_prompts.py --set training.precision=fp32"
    [serving]="$one python benchmarks/serving.py --seconds 30"
    [training_step]="python benchmarks/training_step.py"
    [quickstart]="bash scripts/test.sh -m slow tests/test_quickstart.py"
    [tests]="bash scripts/test.sh"
    [components]="python evaluate_parts.py --split test --samples 300 --out $out/components"
    [scoreboard]="python evaluate.py --split test --samples 200 --out $out/scoreboard"
)
mkdir -p $out
[ $# -gt 0 ] || set -- index caption_records features demo decoding_fp32 decoding long_prompts_fp32 \
    serving training_step quickstart tests components scoreboard
for name; do
    [ -n "${commands[$name]:-}" ] || fail "no measurement $name: one of ${!commands[*]}"
    # shellcheck disable=SC2086  # words of a command
    measure "$name" ${commands[$name]}
done
