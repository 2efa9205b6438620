#!/usr/bin/env bash
# Trains one stage with DeepSpeed: bash scripts/train.sh --stage 1 [arguments of code/train.py]
# Options of DeepSpeed's launcher go to it: --include, --exclude, --num_gpus, --hostfile, --num_nodes,
# --master_addr, --master_port, --no_ssh, --node_rank, --launcher, --ssh_port and others. By default
# it starts a process for each GPU in CUDA_VISIBLE_DEVICES, or one on the first GPU or on the CPU.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
use_python
if ! has_gpu; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # it would detect this, with a warning
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads yield the CPU

# The processes end when this one was killed. Not a variable that is set on other machines, where the
# number is another process's.
export TRAIN_SH_PID=$$

# DeepSpeed's launcher forwards signals with a limit of 30 s, or not at all. It therefore runs in a
# new session, which the terminal does not signal, and signals are sent to the processes directly.
setsid python -P -m nextgpt.tools.launch "$root/code/train.py" "$@" &
child=$!
signalled=0
forwarded=
stop() {
    signalled=143
    for node in $child $(pgrep -P $child); do
        if grep -qz '^deepspeed.launcher.launch$' "/proc/$node/cmdline" 2>/dev/null; then
            pkill -TERM -P "$node" || kill -TERM "$node"
            return 0 # without a number, that of the interrupted wait
        fi
    done
    if grep -qz '^nextgpt.tools.launch$' "/proc/$child/cmdline" 2>/dev/null; then
        forwarded=1 # on several machines the launcher forwards it, and exits with 1
    fi
    kill -TERM $child
}
trap stop TERM INT HUP
status=0
while kill -0 $child 2>/dev/null; do
    wait $child && status=0 || status=$?
done
if [ $status -eq 0 ] || [ "$forwarded" = $status ]; then
    status=$signalled
elif [ $status -gt 128 ] && [ $status -lt 255 ] && [ $signalled -eq 0 ]; then # 255: of ssh
    echo "error: training was killed (exit code $status), perhaps for lack of memory: see --plan" >&2
fi
exit $status
