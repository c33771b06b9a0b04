"""From a typed config to a finished run: the three launchers (local, env, deepspeed), which are plug-ins, and how a run
is started, resumed and checked with one. The screen is a `Display` that a command hands in. A rank is `python -m
opsd_cli.rank RUN_DIR TASK` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from opsd_cli.launch.attempt import Attempt, OpenDisplay, Prepared, locked_attempt, new_attempt, run_attempt, with_date
from opsd_cli.launch.devices import Choice, Device, DeviceChoice, choose_ranks
from opsd_cli.launch.rank_environ import Place, free_port, quiet_environ, rank_environ
from opsd_cli.launch.remote_rank import STOP_FILE
from opsd_cli.launch.supervisor import Limits, RankProcess
from opsd_cli.launch.torchrun_slurm import await_first_rank, launch_id, place_of, refuse_other_device
from opsd_cli.launch.tracking import require_tracker
from opsd_cli.run.events import number as number_in
from opsd_cli.run.events import read_events
from opsd_cli.run.folder import (
    RunFolder,
    discard_unstarted,
    new_run_folder,
    open_run_folder,
    read_command,
    read_config,
    refuse_links,
    shell_path,
    write_command,
    write_config,
)
from opsd_cli.run.plugin_copies import copy_plugins, require_plugins
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.plugin_files import words_for_ranks
from opsd_cli.settings.registry import DrawsBeside, Launcher, plugin
from opsd_cli.settings.resume_rules import apply_changes
from opsd_cli.settings.typed_config import plain_tree

Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]

WORKER = ("-P", "-m", "opsd_cli.rank")
"""What Python runs as a rank. -P: a file in the working directory must not stand in for a library."""

REMOTE_RANK = Path(__file__).with_name("remote_rank.py")
_FORWARDED = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that DeepSpeed's runners do not pass to other machines. Tokens are never put on a command line."""


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


@plugin("launcher", "deepspeed")
class DeepSpeedLauncher:
    """Several machines through DeepSpeed's own multi-node runner, which needs a shared file system for run.root. A stop
    request travels as a file in the run folder, because the runner does not pass signals on in time. Not tested between
    machines with pdsh, MPI or SLURM: only the command's text, and a run on a host file that names this machine."""

    hostfile: str  # lines `HOST slots=N`
    runner: Literal["pdsh", "openmpi", "mpich", "impi", "slurm"]
    runner_args: str  # passed to pdsh, mpirun or srun as they are
    master_port: Annotated[int, Field(ge=1024, le=65535)]
    device: DeviceChoice  # auto: cuda if torch can use a GPU of this machine; cuda: not checked here
    threads: Count | None  # OMP threads per rank; None: cores / ranks of the machine
    save_seconds: Seconds  # after a signal, for the ranks to save and end
    stall_seconds: Seconds | None  # without a sign of life from any rank; then all are ended; None: no limit

    def prepare(self, environ: Mapping[str, str], *, beside: int = 0) -> Prepared:
        """Raises ConfigError for an invalid host file."""
        hosts = read_hostfile(typed_path(self.hostfile).absolute())
        # A login node may lack the GPUs of the machines in the host file; each rank asks its own torch.
        choice = Choice(1, "cuda") if self.device == "cuda" else choose_ranks(None, self.device, environ=environ)

        def processes(folder: RunFolder, task: str, cwd: Path) -> list[RankProcess]:
            argv = self.command(folder.path, task, hosts=hosts, device=choice.device, environ=environ)
            log, stop_file = folder.logs / "deepspeed.log", folder.path / STOP_FILE
            here = quiet_environ(environ, device=choice.device)
            return [RankProcess(0, argv, here, cwd, log, "rank_*.error", stop_file)]

        return Prepared(processes, choice.device, notes=choice.notes)

    def command(
        self, run: Path, task: str, *, hosts: Mapping[str, int], device: Device, environ: Mapping[str, str]
    ) -> tuple[str, ...]:
        """The words that start DeepSpeed's runner. The ranks meet at the first of the hosts."""
        master, port = next(iter(hosts)), str(self.master_port)
        options = [
            f"--hostfile={typed_path(self.hostfile).absolute()}",
            f"--launcher={self.runner}",
            f"--launcher_args={self.runner_args}",
            f"--master_addr={master}",
            f"--master_port={port}",
            "--no_local_rank",
            *(["--no_ssh_check"] if self.runner != "pdsh" else []),  # only pdsh uses ssh
        ]
        forwarded = [f"{name}={environ[name]}" for name in _FORWARDED if name in environ]
        rank = [str(REMOTE_RANK), str(run), task, device, str(self.threads or 0), master, port]
        rank += [*forwarded, *words_for_ranks()]
        return (sys.executable, "-m", "deepspeed.launcher.runner", *options, *rank)


def read_hostfile(path: Path) -> dict[str, int]:
    """Host name -> ranks, from lines like `worker-1 slots=4`. Raises ConfigError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launcher.hostfile {path} cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if text and (not match or match[1] in hosts):
            problem = "is a duplicate host" if match else "is not `HOST slots=N`"
            raise ConfigError(f"{path}:{number}: {text!r} {problem}")
        if match:
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"launcher.hostfile {path} names no host; write one `HOST slots=N` per line")
    return hosts


def start_run(
    config: Config,
    *,
    task: str,
    argv: Sequence[str],
    hint: str,
    open_display: OpenDisplay,
    chosen: Mapping[str, str | None] | None = None,
    after: Callable[[RunFolder], None] | None = None,
) -> int:
    """Run `task` (train, eval, check) in a new run folder and return the exit code. The folder is `run.root/run.name`,
    or the first free `<hint>-001`; its command.json records the options `chosen` (group -> option). A check runs one
    rank and leaves no folder, and neither does a run that was refused or stopped before it began. Raises ConfigError or
    OutsideError if the run cannot be started; once ranks have started, the display shows their errors. `after` is given
    the folder of a run that completed."""
    if task != "eval" and config.model.checkpoint is not None:
        raise ConfigError(
            "model.checkpoint is for `opsd eval` and `opsd generate`; to train on from a checkpoint, export it "
            "(`opsd export RUN OUT --step N`) and start from model=hf model.path=OUT"
        )
    if task == "check":
        return _check(config, hint=hint, open_display=open_display)
    require_tracker(config.track.to)
    prepared: Prepared = config.launcher.prepare(os.environ, beside=processes_beside(config, task))
    with new_attempt(config, prepared, task=task, argv=argv, chosen=chosen, hint=hint) as attempt:
        code = run_attempt(
            attempt, prepared, limits=_limits_of(config.launcher), open_display=open_display, track=config.track
        )
        if code in _NOTHING_TO_KEEP and not prepared.is_follower:
            discard_unstarted(attempt.folder)
        if code == ExitCode.DONE and after is not None and not prepared.is_follower:
            after(attempt.folder)
        return code


def resume_run(
    run: str | Path,
    *,
    argv: Sequence[str],
    changes: Mapping[str, Any],
    check: Callable[[Mapping[str, Any]], Config],
    open_display: OpenDisplay,
    task: Literal["train", "eval"] = "train",
    accept_changed_plugin: bool = False,
) -> int:
    """Continue the run in folder `run` from its newest checkpoint (a measurement: from what it has) and return the exit
    code. `changes` are dotted keys with parsed values; `check` makes a tree a typed and checked config. Raises
    ConfigError for a key that a resume may not change, for a run that is complete, for a folder in use, and where
    plug-ins of the run are not given again."""
    folder = open_run_folder(run)
    refuse_links(folder.path)
    command = f"opsd {task} --resume {shell_path(folder.path)}"
    if (was := read_command(folder).get("task", task)) != task:
        raise ConfigError(
            f"{shell_path(folder.path)} is of `opsd {was}`: opsd {was} --resume {shell_path(folder.path)}"
        )
    require_plugins(folder, command=command, accept_changed=accept_changed_plugin)
    tree = apply_changes(read_config(folder), changes)
    config = check(tree)
    if config.model.trust_remote_code and changes.get("model.trust_remote_code") is not True:
        raise ConfigError(
            f"the config of {shell_path(folder.path)} runs code that comes with {config.model.path}; if you trust it, "
            f"allow it: {command} model.trust_remote_code=true"
        )
    last = (read_events(folder.events) or [{}])[-1]
    is_complete = last.get("kind") == "run_ended" and last["outcome"] == "completed"
    if is_complete and task == "eval":
        raise ConfigError(f"{shell_path(folder.path)} is complete: there is nothing left to measure")
    if is_complete and config.train.steps <= last["step"]:
        raise ConfigError(
            f"run {shell_path(folder.path)} is complete: {last['step']} of {config.train.steps} steps; "
            "there is nothing left to continue"
        )
    require_tracker(config.track.to)
    used = seconds_of_steps(folder)
    if is_complete and config.train.seconds is not None and used >= config.train.seconds:
        raise ConfigError(
            f"run {shell_path(folder.path)} is complete: its {last['step']} steps took {used:.1f} s of "
            f"train.seconds={config.train.seconds:g}; with optim.schedule=constant it can be given more"
        )
    prepared: Prepared = config.launcher.prepare(os.environ, beside=processes_beside(config, "train"))
    was_in = Path(read_command(folder).get("cwd", ""))  # relative paths in the config are relative to it
    cwd = was_in if was_in.is_absolute() and was_in.is_dir() else Path.cwd()
    limits = _limits_of(config.launcher)
    if prepared.place is not None and prepared.is_follower:
        await_first_rank(folder.path, launch_id(os.environ, prepared.place))
        refuse_other_device(folder, prepared.place, prepared.device)
        attempt = Attempt(folder, task, cwd)
        return run_attempt(attempt, prepared, limits=limits, open_display=open_display, track=config.track)
    with locked_attempt(folder, prepared, argv=argv, task=task, cwd=cwd, changes=dict(changes)) as attempt:
        if changes:
            write_config(folder, tree)
        return run_attempt(attempt, prepared, limits=limits, open_display=open_display, track=config.track)


def processes_beside(config: Config, task: str) -> int:
    """How many processes the ranks start on devices of their own."""
    sampler = config.sampler
    if task != "train" or not isinstance(sampler, DrawsBeside) or sampler.placement == "shared":
        return 0
    return sampler.processes


def seconds_of_steps(folder: RunFolder) -> float:
    """What a run has used of its train.seconds."""
    steps = (event["metrics"] for event in read_events(folder.events) if event["kind"] == "step")
    return sum(number_in(metrics.get("time/step")) for metrics in steps)


def _limits_of(launcher: Launcher) -> Limits:
    return Limits(save_seconds=launcher.save_seconds, stall_seconds=launcher.stall_seconds)


_NOTHING_TO_KEEP = (ExitCode.CHANGE_SOMETHING, ExitCode.INTERRUPTED, ExitCode.TERMINATED)
"""Exit codes after which a run that had not begun leaves no folder: its message says everything, or the user stopped
it."""


def _check(config: Config, *, hint: str, open_display: OpenDisplay) -> int:
    """One rank on this machine, whatever the launcher, in a temporary folder; one with a traceback in it stays."""
    own = config.launcher
    one_rank = LocalLauncher(
        ranks=1, device=own.device, threads=own.threads, save_seconds=1.0, stall_seconds=own.stall_seconds
    )
    prepared = one_rank.prepare(os.environ)
    root = tempfile.mkdtemp(prefix="opsd-check-")
    folder = new_run_folder(root, name=None, hint=hint)
    try:
        write_config(folder, plain_tree(with_date(config)))
        write_command(folder, argv=(), plugins=copy_plugins(folder))
        attempt = Attempt(folder, "check", Path.cwd())
        return run_attempt(
            attempt, prepared, limits=_limits_of(one_rank), open_display=open_display, track=config.track
        )
    finally:
        if not folder.crash.exists():  # the last message names it
            shutil.rmtree(root, ignore_errors=True)


def _worker(folder: RunFolder, task: str, cwd: Path, place: Place, environ: dict[str, str]) -> RankProcess:
    argv = (sys.executable, *WORKER, str(folder.path), task, *words_for_ranks())
    return RankProcess(place.rank, argv, environ, cwd, folder.log_of(place.rank), folder.error_of(place.rank).name)
