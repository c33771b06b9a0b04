#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, in namespaces of its own, and opsd under it for real: see
# scripts/slurm_check.py, which gets the arguments. Needs root and Debian's slurm-wlm and munge.
#   scripts/slurm.sh                 everything: fifteen to thirty minutes on two cores
#   scripts/slurm.sh --install ...   first installs what is missing with apt-get; no daemon of the machine is started
#   scripts/slurm.sh -- COMMAND ...  a command of your own in the cluster
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

if [ "${1:-}" = --install ]; then
  shift
  PATH=$PATH:/usr/sbin:/sbin
  if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    # A policy that starts nothing while the packages are unpacked; removed again if it was not there.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
      printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
      trap 'rm -f "$policy"' EXIT
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge iproute2 util-linux >&2
    [ -n "$(trap -p EXIT)" ] && rm -f "$policy" && trap - EXIT
  fi
fi
python=${OPSD_PYTHON:-.venv/bin/python}
[ -x "$python" ] || fail "no $python; ./scripts/test.sh makes it, or set OPSD_PYTHON"
exec "$python" scripts/slurm_check.py "$@"
