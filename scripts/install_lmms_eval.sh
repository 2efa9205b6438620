#!/usr/bin/env bash
# Installs lmms-eval into .venv-lmms-eval, an environment of its own that also sees the packages of
# .venv: lmms-eval's requirements exclude some of theirs.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."

bash scripts/install.sh
environment=.venv-lmms-eval
.venv/bin/python -m venv "$environment"
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$packages')" >"$own/nextgpt_packages.pth"
"$environment/bin/pip" install --quiet --no-compile --disable-pip-version-check --no-deps \
    --requirement requirements-lmms-eval.txt
"$environment/bin/python" -c "import lmms_eval.evaluator"
echo "lmms-eval: $environment/bin/python -m lmms_eval --model nextgpt"
