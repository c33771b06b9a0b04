#!/usr/bin/env bash
# The main job on a fresh machine: makes .venv, installs opsd, trains the bundled model and shows what it learnt.
# Arguments go to opsd: ./scripts/quickstart.sh train.steps=10 divergence=jsd
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment .venv
exec .venv/bin/opsd train recipe=quickstart "$@"
