"""The far end of a launch on several machines: what DeepSpeed's runner starts, once per rank. It finds its place from
whatever variables the runner sets, sees that run folder and opsd are the command's, and keeps the rank (`keeper`)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from opsd_cli import __version__
from opsd_cli.launch import launchers
from opsd_cli.launch.far_ranks import ATTEMPT, MARK, Failure, Launch, read_launch
from opsd_cli.launch.keeper import Child, Ended, keep
from opsd_cli.launch.rank_environ import rank_environ
from opsd_cli.launch.torchrun_slurm import place_of
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.rank_errors import write_error
from opsd_cli.settings.errors import ExitCode, OutsideError


def main(argv: Sequence[str]) -> int:
    """Keep the rank and return the exit code for the runner. `argv`: RUN_DIR TASK DEVICE THREADS HOST PORT [NAME=VALUE
    ...] [PLUGIN ...]; THREADS 0 is a fair share. No flags: DeepSpeed's own parser would take them for its own."""
    run, task, device, threads, address, port, *words = argv
    variables, plugins = ([word for word in words if ("=" in word) is wanted] for wanted in (True, False))
    folder = RunFolder(Path(run))
    base = {"MASTER_ADDR": address, "MASTER_PORT": port, **os.environ}
    base |= dict(variable.split("=", 1) for variable in variables)
    place = place_of(base)

    def environ(interface: str | None) -> Mapping[str, str]:
        own = rank_environ(base, place, device="cpu" if device == "cpu" else "cuda", threads=int(threads) or None)
        # What the host's own name leads to need not be an address at which others reach it.
        return {**({"GLOO_SOCKET_IFNAME": interface} if interface else {}), **own}

    launch: Launch | None = None
    try:
        launch = launch_here(folder, place.rank, base.get(ATTEMPT, ""))
        refuse_other_opsd(launch, place.rank)
        rank = (sys.executable, *launchers.WORKER, run, task, *plugins)
        return keep(Child(rank, folder.log_of(place.rank), environ), place, folder, launch)
    except Ended as ended:
        return ended.code
    except Failure as failure:
        tell(failure, folder if launch else None)
        return failure.code


def launch_here(folder: RunFolder, rank: int, attempt: str) -> Launch:
    """What the command wants. Raises Failure if this is not the command's folder."""
    launch = read_launch(folder)
    if launch is None or launch.attempt != attempt:
        found = "is not there" if not folder.path.exists() else "is another folder there"
        message = f"{folder.path} {found}; run.root must be on a file system that every machine shares, under one name"
        raise Failure(rank, message, code=ExitCode.CHANGE_SOMETHING)
    return launch


def refuse_other_opsd(launch: Launch, rank: int) -> None:
    """Raise Failure if this machine's opsd is not the command's."""
    if launch.opsd != __version__:
        message = f"has opsd {__version__}, and the command is of opsd {launch.opsd}; install the same on every machine"
        raise Failure(rank, message, code=ExitCode.CHANGE_SOMETHING)


def tell(failure: Failure, folder: RunFolder | None) -> None:
    """Leave the failure in the folder, if it is the run's, and say it to the runner."""
    is_consequence = failure.is_consequence
    if folder is not None:
        with contextlib.suppress(OutsideError):
            write_error(folder, failure.rank, failure.message, exit_code=failure.code, is_consequence=is_consequence)
    record = {"rank": failure.rank, "exit_code": int(failure.code), "message": failure.message}
    with contextlib.suppress(OSError):  # the connection to the runner may be gone
        print(f"{MARK}{json.dumps(record | {'is_consequence': is_consequence})}", flush=True)
