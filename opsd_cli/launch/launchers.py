"""The launchers that start ranks on this machine: `local`, and `env`, which is one rank that something else started.
A rank is `python -m opsd_cli.rank RUN_DIR TASK` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from opsd_cli.launch.attempt import Prepared
from opsd_cli.launch.devices import DeviceChoice, choose_ranks
from opsd_cli.launch.rank_environ import Place, free_port, rank_environ
from opsd_cli.launch.supervisor import RankProcess
from opsd_cli.launch.torchrun_slurm import place_of
from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.plugin_files import words_for_ranks
from opsd_cli.settings.registry import plugin

Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]

WORKER = ("-P", "-m", "opsd_cli.rank")
"""What Python runs as a rank. -P: a file in the working directory must not stand in for a library."""


@plugin("launcher", "local")
class LocalLauncher:
    """One process per device of this machine, or as many as asked for on the CPU."""

    ranks: Count | None  # None: one per visible GPU, else one
    device: DeviceChoice
    threads: Count | None  # OMP threads per rank; None: cores / ranks
    save_seconds: Seconds  # after a signal, for the ranks to save and end; then they are killed
    stall_seconds: Seconds | None  # without a sign of life from any rank; then all are ended; None: no limit

    def prepare(self, environ: Mapping[str, str], *, beside: int = 0) -> Prepared:
        """Raises ConfigError or OutsideError if this machine lacks what is asked for."""
        choice = choose_ranks(self.ranks, self.device, environ=environ, beside=beside)
        own = partial(rank_environ, environ, device=choice.device, threads=self.threads, beside=beside)

        def processes(folder: RunFolder, task: str, cwd: Path) -> list[RankProcess]:
            port, ranks = free_port(environ), choice.ranks
            places = [Place(rank, rank, ranks, ranks, "127.0.0.1", port) for rank in range(ranks)]
            return [_worker(folder, task, cwd, place, own(place)) for place in places]

        return Prepared(processes, choice.device, notes=choice.notes)


@plugin("launcher", "env")
class EnvLauncher:
    """The ranks were started by torchrun, srun or mpirun: `srun opsd train ... launcher=env`. Every rank composes the
    same config; rank 0 makes the run folder and shows the run, the others wait for the folder. Each supervises one
    child, so that signals, logs and errors are handled as on one machine."""

    device: DeviceChoice
    threads: Count | None  # OMP threads per rank; None: cores / ranks of the machine
    save_seconds: Seconds  # after a signal; torchrun kills its ranks after 30 s in any case
    stall_seconds: Seconds | None  # without a sign of life from any rank; then all are ended; None: no limit

    def prepare(self, environ: Mapping[str, str], *, beside: int = 0) -> Prepared:
        """Raises ConfigError if the variables of torchrun, srun or mpirun are missing."""
        place = place_of(environ)
        choice = choose_ranks(None, self.device, environ=environ, only=place.local_rank)

        def processes(folder: RunFolder, task: str, cwd: Path) -> list[RankProcess]:
            own = rank_environ(environ, place, device=choice.device, threads=self.threads)
            return [_worker(folder, task, cwd, place, own)]

        return Prepared(processes, choice.device, place, notes=choice.notes)


def _worker(folder: RunFolder, task: str, cwd: Path, place: Place, environ: dict[str, str]) -> RankProcess:
    argv = (sys.executable, *WORKER, str(folder.path), task, *words_for_ranks())
    return RankProcess(place.rank, argv, environ, cwd, folder.log_of(place.rank), folder.error_of(place.rank).name)
