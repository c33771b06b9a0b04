"""A rank on another machine: the script that DeepSpeed's multi-node runners start, once per rank. It finds its place
from whatever variables the runner sets, sets the environment a local rank would have, sends its output to the run
folder's log, watches for the stop file (signals do not cross machines) and then becomes `python -m opsd_cli.rank
RUN_DIR TASK`. A script and not a module, because DeepSpeed's SLURM runner cannot start modules."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_STOP_POLL_SECONDS = 0.5


def main(argv: Sequence[str]) -> None:
    """Become the rank. `argv`: RUN_DIR TASK DEVICE THREADS HOST PORT [NAME=VALUE ...] [PLUGIN ...]; THREADS 0 is a fair
    share. No flags: DeepSpeed's own parser would take them for its own."""
    from opsd_cli.launch.rank_environ import rank_environ
    from opsd_cli.launch.torchrun_slurm import place_of
    from opsd_cli.run.folder import RunFolder

    run, task, device, threads, address, port, *words = argv
    variables, plugins = ([word for word in words if ("=" in word) is wanted] for wanted in (True, False))
    folder = RunFolder(Path(run))
    environ = {"MASTER_ADDR": address, "MASTER_PORT": port, **os.environ}
    environ |= dict(variable.split("=", 1) for variable in variables)
    place = place_of(environ)
    os.environ.update(
        rank_environ(environ, place, device="cpu" if device == "cpu" else "cuda", threads=int(threads) or None)
    )
    log = os.open(folder.log_of(place.rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_watch, args=(folder.path / STOP_FILE,), daemon=True).start()
    sys.argv = ["opsd_cli.rank", run, task, *plugins]
    runpy.run_module("opsd_cli.rank", run_name="__main__", alter_sys=True)


STOP_FILE = "stop"
"""In the run folder: holds the number of the signal that asks every rank to save and stop."""


def _watch(stop_file: Path) -> None:
    while not stop_file.exists():
        time.sleep(_STOP_POLL_SECONDS)
    number = stop_file.read_text().strip() or str(int(signal.SIGTERM))
    os.kill(os.getpid(), int(number))


if __name__ == "__main__":
    # Started by path, Python has put this file's folder first; the package's root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    main(sys.argv[1:])
