#!/usr/bin/env bash
# Every benchmark of docs/performance.md, one after another, at its usual sizes: an hour or two on two CPU cores.
#   scripts/bench/all.sh          on the CPU
#   scripts/bench/all.sh --gpu    on the first GPU, at real shapes, in under eight minutes
# Run it on an idle machine, in an environment made with: pip install -c constraints.txt -e '.[bench]'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python}
names=(loss rollout step memory groups)
[ "${1:-}" = --gpu ] || names+=(overhead scale traffic)  # which are about a CPU's time around a step
for name in "${names[@]}"; do
  printf '\n## %s\n\n' "$name $*"
  "$python" "$name.py" "$@"
done
if [ $# -eq 0 ]; then
  printf '\n## step --model wide\n\n'
  "$python" step.py --model wide --steps 5 --rounds 1
  for name in step overhead; do
    printf '\n## %s\n\n' "$name --model medium"
    "$python" "$name.py" --model medium --steps 6
  done
fi
