#!/usr/bin/env bash
# launcher=deepspeed between machines, for real: two nodes on this machine (namespaces with a network, a host name, processes
# and an sshd of their own, joined by a switch), trained on over ssh and mpirun, compared with a local run; then the faults of
# docs/launching.md, each with its promise. Needs root, ip, unshare, nsenter, sshd, pdsh; with mpirun its runner as well, with
# faketime clocks that differ. About half an hour for everything. Whatever it starts ends with it, after NODES_SECONDS at the
# latest (default 5400).
#   scripts/nodes.sh                     everything
#   scripts/nodes.sh --only runs         no faults; --only faults: no comparisons; --only "far node": rows whose name has it
#   scripts/nodes.sh --list              what there is
#   scripts/nodes.sh --install           installs with apt what is missing, first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

if [ "${1:-}" = --install ]; then
  shift
  [ "$(id -u)" = 0 ] || fail "--install needs root"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq iproute2 openssh-server pdsh openmpi-bin faketime >&2
fi
missing=""
[ "$(id -u)" = 0 ] || missing+=" root"
for tool in ip unshare nsenter sshd pdsh; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null 2>&1 || missing+=" $tool"
done
[ -z "$missing" ] || fail "missing:$missing; --install gets the tools with apt (iproute2 util-linux openssh-server pdsh)"
python=${OPSD_PYTHON:-.venv/bin/python}
[ -x "$python" ] || fail "no $python; ./scripts/test.sh makes it, or set OPSD_PYTHON"
export PATH=$PATH:/usr/sbin:/sbin PYTHONPATH=$PWD:$PWD/scripts
exec timeout --foreground --signal=TERM --kill-after=20 "${NODES_SECONDS:-5400}" "$python" -m nodes "$@"
