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
measurements() { # name, command
    cat <<END
index python benchmarks/index.py
caption_records python benchmarks/caption_records.py
features OMP_NUM_THREADS=1 python benchmarks/features.py --rounds 15
demo python benchmarks/demo.py
decoding_fp32 OMP_NUM_THREADS=1 python benchmarks/decoding.py --precision fp32
decoding OMP_NUM_THREADS=1 python benchmarks/decoding.py
long_prompts_fp32 OMP_NUM_THREADS=1 python benchmarks/long_prompts.py --set training.precision=fp32
serving OMP_NUM_THREADS=1 python benchmarks/serving.py --seconds 30
training_step python benchmarks/training_step.py
quickstart bash scripts/test.sh -m slow tests/test_quickstart.py
tests bash scripts/test.sh
components python evaluate_parts.py --split test --samples 300 --out $out/components
scoreboard python evaluate.py --split test --samples 200 --out $out/scoreboard
END
}
mkdir -p $out
for name; do
    measurements | grep -q "^$name " || fail "no measurement $name: see $0"
done
while read -r -u 3 name command; do
    # shellcheck disable=SC2086  # words of a command
    case " ${*:-$name} " in *" $name "*) measure "$name" $command ;; esac
done 3< <(measurements)
