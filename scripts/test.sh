#!/usr/bin/env bash
# The whole test suite on a fresh machine: makes .venv (or $OPSD_VENV), installs opsd, runs the linters and the tests.
# Arguments go to pytest: ./scripts/test.sh tests/test_divergence.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
venv=${OPSD_VENV:-.venv}
make_environment "$venv" dev
if [ $# -eq 0 ]; then
  "$venv/bin/python" -m ruff check .
  "$venv/bin/python" -m ruff format --check .
  "$venv/bin/python" -m mypy
  set -- -n 2 --dist loadfile # two files at a time; a file's fixtures are made once
fi
exec "$venv/bin/python" -m pytest "$@"
