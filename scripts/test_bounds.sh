#!/usr/bin/env bash
# The tests at one end of the versions that pyproject.toml allows, in an environment of their own (.venv-lowest or
# .venv-highest; elsewhere with OPSD_VENV). Torch is whatever build the package index serves: from PyPI about 3 GB.
#   scripts/test_bounds.sh lowest                     every dependency at its lower bound
#   scripts/test_bounds.sh highest                    every dependency as new as the bounds let it be
#   scripts/test_bounds.sh lowest tests/test_runs.py  arguments go to pytest; by default the tests of what others wrote
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

end=${1:-}
[ "$end" = lowest ] || [ "$end" = highest ] || fail "say which end: lowest or highest"
shift
venv=${OPSD_VENV:-.venv-$end}

# name==lower bound for each direct dependency; what those need themselves is left to pip.
lower_bounds() {
  "$python" - <<'PYTHON'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    dependencies = tomllib.load(file)["project"]["dependencies"]
for dependency in dependencies:
    name, lower = re.fullmatch(r"([\w.-]+)>=([\w.]+)(?:,.*)?", dependency).groups()
    print(f"{name}=={lower}")
PYTHON
}

python=$(find_python)
wanted="$(cksum <pyproject.toml) $PWD"
if [ ! -f "$venv/.opsd-bounds" ] || [ "$(cat "$venv/.opsd-bounds")" != "$wanted" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
  if [ "$end" = lowest ]; then
    lower_bounds >"$venv/bounds.txt"
    echo "numpy<2.4" >>"$venv/bounds.txt" # with a newer one the triton of torch 2.11 cannot interpret kernels on a CPU
  else
    : >"$venv/bounds.txt"
  fi
  echo "Installing opsd with the $end versions allowed into $venv (several minutes) ..." >&2
  "$venv/bin/python" -m pip install --disable-pip-version-check -c "$venv/bounds.txt" -e '.[dev]' \
    >"$venv/install.log" 2>&1 || { tail -n 20 "$venv/install.log" >&2; fail "the $end versions do not fit together"; }
  echo "$wanted" >"$venv/.opsd-bounds"
fi
"$venv/bin/python" -m pip list --format=freeze --disable-pip-version-check |
  grep -iE '^(torch|transformers|deepspeed|hydra-core|omegaconf|rich|datasets|peft|math-verify|pydantic|pyyaml|safetensors)=='
if [ $# -eq 0 ]; then
  set -- tests/test_runs.py tests/test_gradients.py tests/test_recipes.py tests/test_datasets.py \
    tests/test_context_prompts.py tests/test_export.py tests/test_hub.py tests/test_llama_decoder.py \
    tests/test_packed.py tests/test_answers.py tests/test_ui.py tests/test_triton_dispatch.py
fi
exec "$venv/bin/python" -m pytest "$@"
