"""From a typed config to a finished run: makes the run folder, freezes the config into it, and has a launcher
start and supervise the ranks. Owns the three launchers (local, deepspeed, env), which are plug-ins, and the
order of these steps. Never imports torch, DeepSpeed or rich: the screen is a `Display` that a command hands
in.

A rank is `python -m opsd_cli.rank.entry RUN_DIR TASK` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from opsd_cli.checks import checked
from opsd_cli.launch.attempt import Attempt, OpenDisplay, Prepared, carry_out, locked, new_attempt
from opsd_cli.launch.deepspeed_command import Runner, deepspeed_command, read_hostfile
from opsd_cli.launch.devices import Choice, DeviceChoice, choose_ranks
from opsd_cli.launch.machine import Place, free_port, quiet_environ, rank_environ
from opsd_cli.launch.remote_rank import STOP_FILE
from opsd_cli.launch.resume import changed_tree
from opsd_cli.launch.supervisor import Limits, RankProcess
from opsd_cli.launch.torchrun_slurm import await_first_rank, launch_id, place_of, refuse_other_device
from opsd_cli.run.events import read_events
from opsd_cli.run.folder import (
    RunFolder,
    discard_unstarted,
    new_run_folder,
    open_run_folder,
    read_command,
    read_config,
    shown,
    write_config,
)
from opsd_cli.run.foreign_folders import refuse_code, refuse_links
from opsd_cli.settings.config import Config, plain_tree, typed_config
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.registry import plugin

Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]

WORKER = ("-P", "-m", "opsd_cli.rank.entry")
"""What Python runs as a rank. -P: the working directory must not stand before the libraries on the module
path.
"""


@plugin("launcher", "local")
class LocalLauncher:
    """One process per device of this machine, or as many as asked for on the CPU."""

    ranks: Count | None  # None: one per visible GPU, else one
    device: DeviceChoice
    threads: Count | None  # OMP threads per rank; None: cores / ranks
    save_seconds: Seconds  # after a signal, for the ranks to save and end; then they are killed
    stall_seconds: Seconds | None  # without a sign of life from any rank; then they are ended; None: for ever

    def prepare(self, environ: Mapping[str, str]) -> Prepared:
        """Raises ConfigError or OutsideError when this machine has not what is asked for."""
        choice = choose_ranks(self.ranks, self.device, environ=environ)
        ranks = choice.ranks

        def environ_of(place: Place) -> dict[str, str]:
            return rank_environ(environ, place, device=choice.device, threads=self.threads)

        def processes(folder: RunFolder, task: str, cwd: Path) -> list[RankProcess]:
            port = free_port()
            places = [Place(rank, rank, ranks, ranks, "127.0.0.1", port) for rank in range(ranks)]
            return [_worker(folder, task, cwd, place, environ_of(place)) for place in places]

        return Prepared(processes, choice.device, notes=choice.notes)


@plugin("launcher", "env")
class EnvLauncher:
    """The ranks were started from outside, by torchrun, srun or mpirun: `srun opsd train ... launcher=env`.

    Every rank composes the same config; rank 0 makes the run folder and shows the run, the others wait for
    it. Each supervises one worker, its child, so that signals, logs and errors are handled as on one machine.
    """

    device: DeviceChoice
    threads: Count | None  # OMP threads per rank; None: cores / ranks of the machine
    save_seconds: Seconds  # after a signal; the outer launcher may have less patience (torchrun: 30 s)
    stall_seconds: Seconds | None  # without a sign of life from any rank; then they are ended; None: for ever

    def prepare(self, environ: Mapping[str, str]) -> Prepared:
        """Raises ConfigError when the variables of an outer launcher are missing."""
        place = place_of(environ)
        choice = choose_ranks(None, self.device, environ=environ, only=place.local_rank)

        def processes(folder: RunFolder, task: str, cwd: Path) -> list[RankProcess]:
            own = rank_environ(environ, place, device=choice.device, threads=self.threads)
            return [_worker(folder, task, cwd, place, own)]

        return Prepared(processes, choice.device, place, notes=choice.notes)


@plugin("launcher", "deepspeed")
class DeepSpeedLauncher:
    """Several machines through DeepSpeed's own multi-node runner, which needs a shared file system for
    run.root.

    A stop request travels as a file in the run folder, because the runner does not pass signals on in time.
    The command is tested as text, and for real with a host file that names this machine; pdsh, MPI and SLURM
    between machines have not been run.
    """

    hostfile: str  # lines `HOST slots=N`
    runner: Runner
    runner_args: str  # passed to pdsh, mpirun or srun as they are
    master_port: Annotated[int, Field(ge=1024, le=65535)]
    device: DeviceChoice  # auto: cuda if torch can use a GPU of this machine; cuda: taken at its word
    threads: Count | None  # OMP threads per rank; None: cores / ranks of the machine
    save_seconds: Seconds  # after a signal, for the ranks to save and end
    stall_seconds: Seconds | None  # without a sign of life from any rank; then they are ended; None: for ever

    def prepare(self, environ: Mapping[str, str]) -> Prepared:
        """Raises ConfigError when the host file is not one."""
        hostfile = Path(self.hostfile).expanduser().absolute()
        hosts = read_hostfile(hostfile)
        # A login node need not have the GPUs that the machines of the host file have; each rank asks its own torch.
        choice = Choice(1, "cuda") if self.device == "cuda" else choose_ranks(None, self.device, environ=environ)

        def processes(folder: RunFolder, task: str, cwd: Path) -> list[RankProcess]:
            argv = deepspeed_command(
                folder.path,
                task,
                hosts=hosts,
                hostfile=hostfile,
                runner=self.runner,
                runner_args=self.runner_args,
                master_port=self.master_port,
                device=choice.device,
                threads=self.threads,
                environ=environ,
            )
            log, stop_file = folder.logs / "deepspeed.log", folder.path / STOP_FILE
            here = quiet_environ(environ, device=choice.device)
            return [RankProcess(0, argv, here, cwd, log, "rank_*.error", stop_file)]

        return Prepared(processes, choice.device, notes=choice.notes)


def start_run(config: Config, *, task: str, argv: Sequence[str], hint: str, open_display: OpenDisplay) -> int:
    """Run `task` (train, eval, check) in a new run folder and return the exit code.

    The folder is `run.root/run.name`, or the first free `<hint>-001`. A check runs one rank and leaves
    nothing; nothing is left either of a run that was refused or stopped before it began. Raises ConfigError
    or OutsideError when the run cannot be started; once ranks have started, their errors are shown by the
    display.
    """
    if task == "check":
        return _check(config, hint=hint, open_display=open_display)
    prepared = config.launcher.prepare(os.environ)
    with new_attempt(config, prepared, task=task, argv=argv, hint=hint) as attempt:
        code = carry_out(attempt, prepared, limits=limits_of(config), open_display=open_display)
        if code in _NOTHING_TO_KEEP and not prepared.is_follower:
            discard_unstarted(attempt.folder)
        return code


def resume_run(run: str | Path, *, argv: Sequence[str], changes: Mapping[str, Any], open_display: OpenDisplay) -> int:
    """Continue the run in folder `run` from its newest checkpoint and return the exit code.

    `changes` are dotted keys with parsed values, of the few that do not change which run it is. Raises ConfigError for
    any other key, for a run that is complete, and for a folder in use.
    """
    import opsd_cli.plugins  # noqa: F401  # which imports this module

    folder = open_run_folder(run)
    refuse_links(folder)
    tree = changed_tree(read_config(folder), changes)
    config = checked(typed_config(tree))
    refuse_code(config, folder, changes)
    _refuse_complete(folder, config)
    prepared = config.launcher.prepare(os.environ)
    was_in = Path(read_command(folder).get("cwd", ""))  # relative paths in the config are relative to it
    cwd = was_in if was_in.is_absolute() and was_in.is_dir() else Path.cwd()
    limits = limits_of(config)
    if prepared.place is not None and prepared.is_follower:
        await_first_rank(folder.path, launch_id(os.environ, prepared.place))
        refuse_other_device(folder, prepared.place, prepared.device)
        attempt = Attempt(folder, "train", cwd)
        return carry_out(attempt, prepared, limits=limits, open_display=open_display)
    with locked(folder, prepared, argv=argv, task="train", cwd=cwd, changes=dict(changes)) as attempt:
        if changes:
            write_config(folder, tree)
        return carry_out(attempt, prepared, limits=limits, open_display=open_display)


def limits_of(config: Config) -> Limits:
    """How long the supervisor waits, as the launcher's settings say."""
    return Limits(save_seconds=config.launcher.save_seconds, stall_seconds=config.launcher.stall_seconds)


_NOTHING_TO_KEEP = (ExitCode.CHANGE_SOMETHING, ExitCode.INTERRUPTED, ExitCode.TERMINATED)
"""Exit codes after which a run that had not begun leaves no folder: all was said, or nothing was wanted."""


def _check(config: Config, *, hint: str, open_display: OpenDisplay) -> int:
    """One rank on this machine, whatever the launcher, in a folder that is gone afterwards."""
    own = config.launcher
    seconds = {"save_seconds": own.save_seconds, "stall_seconds": own.stall_seconds}
    one_rank = LocalLauncher(ranks=1, device=own.device, threads=own.threads, **seconds)
    prepared = one_rank.prepare(os.environ)
    with tempfile.TemporaryDirectory(prefix="opsd-check-") as root:
        folder = new_run_folder(root, name=None, hint=hint)
        write_config(folder, plain_tree(config))
        attempt = Attempt(folder, "check", Path.cwd())
        return carry_out(
            attempt,
            prepared,
            limits=Limits(save_seconds=1.0, stall_seconds=own.stall_seconds),
            open_display=open_display,
        )


def _refuse_complete(folder: RunFolder, config: Config) -> None:
    """Raise ConfigError when there is nothing left to do."""
    last = next(iter(reversed(read_events(folder.events))), None)
    is_complete = last is not None and last["kind"] == "run_ended" and last["outcome"] == "completed"
    if is_complete and last is not None and config.train.steps <= last["step"]:
        raise ConfigError(
            f"run {shown(folder.path)} is complete: {last['step']} of {config.train.steps} steps; "
            "nothing is left to continue"
        )


def _worker(folder: RunFolder, task: str, cwd: Path, place: Place, environ: dict[str, str]) -> RankProcess:
    argv = (sys.executable, *WORKER, str(folder.path), task)
    return RankProcess(place.rank, argv, environ, cwd, folder.log_of(place.rank), folder.error_of(place.rank).name)
