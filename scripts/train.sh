#!/usr/bin/env bash
# Trains one stage with DeepSpeed: bash scripts/train.sh --stage 1 [arguments of code/train.py]
# --include, --exclude, --hostfile, --num_nodes, --num_gpus, --master_addr and --master_port go to
# the launcher; by default it starts one process, on the first GPU or on the CPU.
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

case " ${launcher[*]-} " in
    *--master_port* | *--hostfile* | *--num_nodes*) ;;
    *) launcher+=(--master_port $((20000 + $$ % 10000))) ;; # for several runs on one machine
esac

# On a CPU, the launcher's limit on the number of processes.
export LOCAL_SIZE=${LOCAL_SIZE:-$(nproc --all)}
if [ ! -e /dev/nvidia0 ] && [ ! -e /dev/kfd ] && [ ! -e /dev/dxg ]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # it would detect this, with a warning
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads yield the CPU
cd "$here"

# DeepSpeed's launcher forwards signals with a limit of 30 s, or not at all. It therefore runs in a
# new session, which the terminal does not signal, and signals are sent to the processes directly.
setsid deepspeed --log_level critical "${launcher[@]}" "$root/code/train.py" \
    ${arguments[@]+"${arguments[@]}"} &
child=$!
signalled=0
stop() {
    signalled=143
    if node=$(pgrep -P $child -f deepspeed.launcher.launch); then
        pkill -TERM -P "$node" || kill -TERM "$node"
    else
        kill -TERM $child # on several machines, the launcher forwards it
    fi
}
trap stop TERM INT HUP
status=0
while kill -0 $child 2>/dev/null; do
    wait $child && status=0 || status=$?
done
if [ $status -eq 0 ]; then
    status=$signalled
elif [ $status -gt 128 ] && [ $signalled -eq 0 ]; then
    echo "error: training was killed (exit code $status), perhaps for lack of memory: see --plan" >&2
fi
exit $status
