# Sourced by the other scripts: sets root, the checkout's folder, and takes Python from its .venv.
root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd -P)

fail() {
    echo "error: $1" >&2
    exit 2
}

# Uses .venv, whose package must be this checkout's, or another environment if there is none.
use_python() {
    local package=
    if [ -d "$root/.venv" ]; then
        export PATH="$root/.venv/bin:$PATH"
        package=$root/code/__init__.py
    fi
    python -c 'if True:
        import importlib.util, os, sys
        spec = importlib.util.find_spec("nextgpt")
        same = spec and (not sys.argv[1] or os.path.samefile(spec.origin, sys.argv[1]))
        sys.exit(not same)' "$package" 2>/dev/null ||
        fail "the package is not installed, or was moved since: run bash scripts/install.sh first"
}

# Whether a GPU has a device file and is not hidden; containers may have others than the first.
has_gpu() {
    case ${CUDA_VISIBLE_DEVICES-all} in "" | -1 | NoDevFiles) return 1 ;; esac
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || [ -e /dev/kfd ] || [ -e /dev/dxg ]
}
