#!/usr/bin/env bash
# Trains one stage with DeepSpeed: bash scripts/train.sh --stage 1 [arguments of code/train.py]
# --include, --exclude, --hostfile, --num_nodes, --num_gpus, --master_addr and --master_port go to
# the launcher; without them it starts one process, on the first GPU or on the CPU.
set -euo pipefail
here=$(pwd)
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
if [ -d "$root/.venv" ]; then
    export PATH="$root/.venv/bin:$PATH"
fi

launcher=()
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --include=* | --exclude=* | --hostfile=* | --num_nodes=* | --num_gpus=* | --master_addr=* | --master_port=*)
            launcher+=("$1") ;;
        --include | --exclude | --hostfile | --num_nodes | --num_gpus | --master_addr | --master_port)
            if [ $# -lt 2 ]; then
                echo "error: $1 needs a value" >&2
                exit 2
            fi
            launcher+=("$1" "$2")
            shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
case " ${launcher[*]-} " in
    *--include* | *--exclude* | *--num_gpus* | *--hostfile*) ;;
    *) launcher+=(--include localhost:0) ;;
esac

# On a CPU the launcher counts this many places for processes.
export LOCAL_SIZE=${LOCAL_SIZE:-$(nproc)}
export PYTHONPATH="$root/code${PYTHONPATH:+:$PYTHONPATH}"
cd "$here"
deepspeed "${launcher[@]}" "$root/code/train.py" ${arguments[@]+"${arguments[@]}"} &
child=$!
# The launcher does not hand signals on to the training processes: its child does.
trap 'pkill -TERM -P $child || kill -TERM $child' TERM INT
wait $child && status=0 || status=$?
while kill -0 $child 2>/dev/null; do
    wait $child && status=0 || status=$?
done
exit $status
