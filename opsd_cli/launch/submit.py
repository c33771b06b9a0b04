"""A run of launcher=slurm as its user sees it: the folder and the batch script are made, the job is submitted, and the
run is followed until it ends. Its ranks are started by the job (`slurm_job`); this process is none of them.

slurm/job.sh    the batch script           slurm/job-N.log     what job N printed
slurm/jobs.jsonl  the jobs so far          slurm/attempts.jsonl  how their attempts ended
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsd_cli.launch.attempt import OpenDisplay, SafeDisplay, chosen_options, with_date
from opsd_cli.launch.process_groups import signal_queue
from opsd_cli.launch.slurm import SlurmLauncher, submission
from opsd_cli.launch.slurm_queue import JobState, require_slurm, state_of, submit
from opsd_cli.run.events import Event, read_events
from opsd_cli.run.folder import (
    RunFolder,
    discard_unstarted,
    new_run_folder,
    shell_path,
    write_command,
    write_config,
    writing,
)
from opsd_cli.run.lock import run_lock
from opsd_cli.run.plugin_copies import copy_plugins
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, ExitCode, OpsdError
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.typed_config import plain_tree

_POLL_SECONDS = 0.2
_FIRST_ASK, _LAST_ASK = 2.0, 15.0  # seconds between questions to SLURM, which serves many people
_LATE_SECONDS = 10.0  # for events of a job that is over to arrive over a shared file system
_TAIL_LINES = 20


def submit_new(
    config: Config,
    launcher: SlurmLauncher,
    *,
    task: str,
    argv: Sequence[str],
    hint: str,
    open_display: OpenDisplay,
    chosen: Mapping[str, str | None] | None,
    after: Callable[[RunFolder], None] | None,
) -> int:
    """Make a run folder, submit its job and follow it; returns the exit code of the run, or 0 where it goes on without
    this process. Raises ConfigError or OutsideError where no job was made; then there is no folder either."""
    require_slurm()
    folder = new_run_folder(config.run.root, name=config.run.name, hint=hint)
    try:
        write_config(folder, plain_tree(with_date(replace(config, run=replace(config.run, name=folder.name)))))
        plugins = copy_plugins(folder)
        write_command(
            folder, argv=argv, task=task, **chosen_options(chosen), **({"plugins": plugins} if plugins else {})
        )
        job = _submit(folder, config, launcher, task=task, cwd=Path.cwd())
    except OpsdError:
        _discard(folder)
        raise
    return _follow_or_leave(folder, launcher, job, open_display, after)


def submit_again(
    folder: RunFolder,
    config: Config,
    launcher: SlurmLauncher,
    *,
    task: str,
    argv: Sequence[str],
    cwd: Path,
    tree: Mapping[str, Any],
    changes: Mapping[str, Any],
    open_display: OpenDisplay,
) -> int:
    """Submit a job that continues a run. Raises ConfigError while an earlier one waits or works."""
    require_slurm()
    job = last_job(folder)
    state = state_of(job) if job else None
    if job and state is not None and not state.is_over:
        raise ConfigError(
            f"job {job} of {shell_path(folder.path)} is {state}; follow it: opsd watch {shell_path(folder.path)}, or "
            f"end it first: scancel {job}"
        )
    with run_lock(folder):
        if changes:
            write_config(folder, tree)
        plugins = copy_plugins(folder)
        recorded = {"plugins": plugins} if plugins else {}
        write_command(folder, argv=argv, task=task, cwd=str(cwd), changes=dict(changes), **recorded)
        job = _submit(folder, config, launcher, task=task, cwd=cwd)
    return _follow_or_leave(folder, launcher, job, open_display, None)


def last_job(folder: RunFolder) -> str:
    """The number of the job that was submitted last for a run, or ""."""
    file = folder.slurm / "jobs.jsonl"
    try:
        job = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["job"]
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return ""
    return job if isinstance(job, str) and job.isdigit() else ""


def preview(config: Config, launcher: SlurmLauncher, *, hint: str) -> str:
    """What would be submitted, for --dry-run."""
    name = config.run.name or f"{hint}-001"
    folder = RunFolder(typed_path(config.run.root).absolute() / name)
    text = launcher.script(folder, task="train", trusts=config.model.trust_remote_code)
    words = submission(folder, folder.slurm / "job.sh", Path.cwd())
    return f"# {shlex.join(words)}\n{text}"


def _submit(folder: RunFolder, config: Config, launcher: SlurmLauncher, *, task: str, cwd: Path) -> str:
    script = folder.slurm / "job.sh"
    text = launcher.script(folder, task=task, trusts=config.model.trust_remote_code)
    words = submission(folder, script, cwd)
    with writing(script):
        folder.slurm.mkdir(exist_ok=True)
        script.write_text(text, encoding="utf-8")
    job = submit(words)
    with writing(folder.slurm), open(folder.slurm / "jobs.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"job": job, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")
    return job


def _discard(folder: RunFolder) -> None:
    """Remove the folder of a run whose job was refused."""
    for path in (folder.slurm / "job.sh", folder.slurm):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    discard_unstarted(folder)


def _follow_or_leave(
    folder: RunFolder,
    launcher: SlurmLauncher,
    job: str,
    open_display: OpenDisplay,
    after: Callable[[RunFolder], None] | None,
) -> int:
    display = SafeDisplay(lambda: open_display(folder.path, quiet=False), folder)
    display.note(
        f"submitted as job {job} (squeue -j {job}); follow it: opsd watch {shell_path(folder.path)}; end it, saving "
        f"first: scancel {job}"
    )
    if not launcher.follow:
        return ExitCode.DONE
    display.note("Ctrl-C leaves the job alone")
    state = _follow(job, display)
    if state is None:
        display.leave(
            f"job {job} goes on without being followed; see it: opsd watch {shell_path(folder.path)}; end it: "
            f"scancel {job}"
        )
        return ExitCode.DONE
    code, message, tail = _outcome(folder, job, state)
    display.poll()
    display.close(code=code, message=message, tail=tail)
    if code == ExitCode.DONE and after is not None:
        after(folder)
    return code


class JobWatch:
    """Asks how a job stands, and not more often than SLURM should be asked."""

    def __init__(self, job: str) -> None:
        self.job, self.state = job, JobState("PENDING")
        self._pause, self._next = _FIRST_ASK, 0.0

    def look(self) -> str:
        """What has changed, in words, or "" ."""
        if time.monotonic() < self._next:
            return ""
        before, now = str(self.state) if self._next else "", state_of(self.job)
        self.state = now or self.state
        has_changed = now is not None and str(now) != before
        self._pause = _FIRST_ASK if has_changed else min(self._pause * 1.5, _LAST_ASK)
        self._next = time.monotonic() + self._pause
        return f"job {self.job}: {self.state}" if has_changed else ""


def _follow(job: str, display: SafeDisplay) -> JobState | None:
    """Show a run until its job is over; returns how it stands then, None if the user has left."""
    watch = JobWatch(job)
    with signal_queue() as wait:
        while not wait(_POLL_SECONDS):
            display.poll()
            news = watch.look()
            if watch.state.is_over:
                return watch.state
            if news:
                display.note(news)
    return None


def _outcome(folder: RunFolder, job: str, state: JobState) -> tuple[int, str, list[str]]:
    """Exit code, message and the end of a log, of a job that is over."""
    end, deadline = _last_end(folder), time.monotonic() + _LATE_SECONDS
    while end is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        end = _last_end(folder)
    resume = f"opsd train --resume {shell_path(folder.path)}"
    log = folder.slurm / f"job-{job}.log"
    if end is not None and (end["outcome"] != "stopped" or state.name in ("CANCELLED", "FAILED", "COMPLETED", "GONE")):
        return int(end["exit_code"]), str(end["message"]) if end["outcome"] == "failed" else "", []
    if state.name == "CANCELLED":
        return int(ExitCode.TERMINATED), f"job {job} was cancelled before the run could save; go on with {resume}", []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:] if log.is_file() else []
    message = f"job {job} ended ({state}) and the run did not; see {shell_path(log)}, then {resume}"
    return int(ExitCode.ENVIRONMENT), message, lines


def _last_end(folder: RunFolder) -> Event | None:
    """How the run ended, if nothing came after it."""
    events = read_events(folder.events)
    return events[-1] if events and events[-1]["kind"] == "run_ended" else None
