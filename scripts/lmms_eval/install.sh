#!/usr/bin/env bash
# Install lmms-eval beside this repository: bash scripts/lmms_eval/install.sh; prints the path of Python.
# A fresh environment .venv-lmms by default (VENV=folder for another one), or that of PYTHON=env/bin/python. On a machine
# without an NVIDIA GPU neither CUDA packages nor a torchvision that cannot be imported are installed. See docs/lmms_eval.md.
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/_lmms.sh" || { echo "error: $0 is a copy. Run the script in its repository: bash REPOSITORY/scripts/lmms_eval/install.sh" >&2; exit 2; }
vispruner_lmms_env
printf '%s\n' "$PY"
