#!/usr/bin/env bash
# The whole test suite on a fresh machine: makes .venv (or $OPSD_VENV), installs opsd, runs the linters and the tests.
#   ./scripts/test.sh                                        everything; about fourteen minutes on two cores, two of them to install
#   ./scripts/test.sh --quick                                linters, types and the tests that are not marked slow
#   ./scripts/test.sh tests/test_divergence.py -x            arguments for pytest alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
venv=${OPSD_VENV:-.venv}
make_environment "$venv" dev
whole=$([ $# -eq 0 ] && echo yes || true)
if [ $# -eq 0 ] || [ "$1" = --quick ]; then
  "$venv/bin/python" -m ruff check .
  "$venv/bin/python" -m ruff format --check .
  "$venv/bin/python" -m mypy
  # Two files at a time, in the order of tests/conftest.py; a file's fixtures are made once.
  set -- ${1:+-m "not slow"} -n 2 --dist loadfile --no-loadscope-reorder
fi
"$venv/bin/python" -m pytest "$@"
if [ -z "$whole" ]; then
  exit
fi
# Beside the others, because peft imports bitsandbytes wherever it is installed: three seconds more at every start.
beside="$venv/quantize"
[ -d "$beside" ] ||
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$beside" -c constraints.txt bitsandbytes
PYTHONPATH="$beside" "$venv/bin/python" -m pytest tests/test_quantize.py
