"""From a typed config to a finished run: how a run is started, resumed and checked with the launcher of its config. The
screen is a `Display` that a command hands in."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opsd_cli.launch.attempt import (
    Attempt,
    OpenDisplay,
    Prepared,
    locked_attempt,
    new_attempt,
    restarted_run,
    run_attempt,
    with_date,
)
from opsd_cli.launch.launchers import LocalLauncher
from opsd_cli.launch.slurm import SlurmLauncher, is_in_job
from opsd_cli.launch.submit import submit_again, submit_new
from opsd_cli.launch.supervisor import Limits
from opsd_cli.launch.torchrun_slurm import attempt_id, await_first_rank, refuse_other_device
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
from opsd_cli.settings.registry import DrawsBeside, Launcher, RunsWords
from opsd_cli.settings.resume_rules import apply_changes
from opsd_cli.settings.typed_config import plain_tree


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
    if isinstance(config.launcher, SlurmLauncher):
        return submit_new(
            config, config.launcher, task=task, argv=argv, hint=hint, open_display=open_display, chosen=chosen,
            after=after,
        )  # fmt: skip
    prepared: Prepared = config.launcher.prepare(os.environ, beside=processes_beside(config, task))
    restarted = restarted_run(config, prepared.place, hint=hint)
    if restarted and (
        why := why_complete(restarted, task=task, steps=config.train.steps, seconds=config.train.seconds)
    ):
        open_display(restarted.path, quiet=prepared.is_follower).note(f"{why}; these ranks were started again")
        return ExitCode.DONE
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
    _refuse_untrusted(config, changes, folder=folder, command=command)
    if why := why_complete(folder, task=task, steps=config.train.steps, seconds=config.train.seconds):
        raise ConfigError(why)
    require_tracker(config.track.to)
    was_in = Path(read_command(folder).get("cwd", ""))  # relative paths in the config are relative to it
    cwd = was_in if was_in.is_absolute() and was_in.is_dir() else Path.cwd()
    if isinstance(config.launcher, RunsWords) and not is_in_job():
        _refuse_untyped(config.launcher, changes, command=command)
    if isinstance(config.launcher, SlurmLauncher) and not is_in_job():
        return submit_again(
            folder, config, config.launcher, task=task, argv=argv, cwd=cwd, tree=tree, changes=changes,
            open_display=open_display,
        )  # fmt: skip
    prepared: Prepared = config.launcher.prepare(os.environ, beside=processes_beside(config, "train"))
    limits = _limits_of(config.launcher)
    if prepared.place is not None and prepared.is_follower:
        await_first_rank(folder.path, attempt_id(os.environ, prepared.place))
        refuse_other_device(folder, prepared.place, prepared.device)
        attempt = Attempt(folder, task, cwd)
        return run_attempt(attempt, prepared, limits=limits, open_display=open_display, track=config.track)
    with locked_attempt(folder, prepared, argv=argv, task=task, cwd=cwd, changes=dict(changes)) as attempt:
        if changes:
            write_config(folder, tree)
        return run_attempt(attempt, prepared, limits=limits, open_display=open_display, track=config.track)


def _refuse_untrusted(config: Config, changes: Mapping[str, object], *, folder: RunFolder, command: str) -> None:
    """Raise ConfigError where a run folder turns code of the model's on."""
    if config.model.trust_remote_code and changes.get("model.trust_remote_code") is not True:
        raise ConfigError(
            f"the config of {shell_path(folder.path)} runs code that comes with {config.model.path}; if you trust it, "
            f"allow it: {command} model.trust_remote_code=true"
        )


def _refuse_untyped(launcher: RunsWords, changes: Mapping[str, object], *, command: str) -> None:
    """Raise ConfigError where a run folder, which may come from somebody else, says what is to be run."""
    for key, value in launcher.typed_only.items():
        if key not in changes:
            shown = list(value) if isinstance(value, tuple) else value
            raise ConfigError(
                f"the config of this run has {key}={shown!r}, which is run as it is; if you trust it, type it again: "
                f"{command} {key}=..."
            )


def why_complete(folder: RunFolder, *, task: str, steps: int, seconds: float | None) -> str:
    """What is said of a run that has nothing left to do at these limits, or ""."""
    last = (read_events(folder.events) or [{}])[-1]
    if last.get("kind") != "run_ended" or last["outcome"] != "completed":
        return ""
    if task == "eval":
        return f"{shell_path(folder.path)} is complete: there is nothing left to measure"
    if steps <= last["step"]:
        return (
            f"run {shell_path(folder.path)} is complete: {last['step']} of {steps} steps; "
            "there is nothing left to continue"
        )
    used = seconds_of_steps(folder)
    if seconds is not None and used >= seconds:
        return (
            f"run {shell_path(folder.path)} is complete: its {last['step']} steps took {used:.1f} s of "
            f"train.seconds={seconds:g}; with optim.schedule=constant it can be given more"
        )
    return ""


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
    # A login node has no GPU to refuse.
    device = "auto" if isinstance(own, SlurmLauncher) else own.device
    one_rank = LocalLauncher(
        ranks=1, device=device, threads=own.threads, save_seconds=1.0, stall_seconds=own.stall_seconds
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
