"""The script that DeepSpeed's multi-node runners start on each machine, once per rank (`far_end`). A script and not a
module, because DeepSpeed's SLURM runner cannot start modules."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Started by path, Python has put this file's folder first; the package's root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from opsd_cli.launch.far_end import main

    raise SystemExit(main(sys.argv[1:]))
