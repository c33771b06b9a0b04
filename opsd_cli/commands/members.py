"""The members of a sweep, one at a time or several at once: each a run of its own in the sweep's folder, taken as it is
where it was finished before, continued where it was stopped."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from opsd_cli.insight.earlier_members import Earlier, find_same, safe_name
from opsd_cli.insight.history import MEMBERS
from opsd_cli.launch.process_groups import die_with
from opsd_cli.launch.share import Places
from opsd_cli.launch.start import resume_run, start_run
from opsd_cli.launch.supervisor import Display
from opsd_cli.preflight import config_of
from opsd_cli.run.events import number, read_events
from opsd_cli.run.folder import RunFolder, shell_path
from opsd_cli.run.summary import summarise
from opsd_cli.settings.command_line import CommandLine
from opsd_cli.settings.compose import Job
from opsd_cli.settings.composition import cap_completions
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ExitCode, OpsdError
from opsd_cli.settings.plugin_files import use_again, used_plugins
from opsd_cli.settings.typed_config import plain_tree
from opsd_cli.ui.display import open_display
from opsd_cli.ui.theme import interval

STOPPED = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
NOT_RUN = -1
ASIDE = "aside"
"""In a sweep's folder: attempts at members that were run again."""


@dataclass(frozen=True)
class Result:
    """How one member ended."""

    name: str  # of its run folder
    swept: Sequence[str]  # settings
    code: int  # its exit code; NOT_RUN: it did not start


class Runner:
    """Runs members as they are composed. Holds no config: a member may run in another process (hydra/launcher)."""

    def __init__(
        self,
        line: CommandLine,
        folder: Path,
        count: int,
        *,
        task: str,
        command: Sequence[str],
        earlier: Sequence[Earlier] = (),
        places: Places | None = None,
        quiet: bool = False,
    ) -> None:
        self._line, self._folder, self._count = line, folder, count
        self._task, self._command = task, command
        self._earlier, self._places, self._quiet = earlier, places, quiet
        self._plugins = used_plugins()
        self._stopped = False

    def run(self, job: Job) -> float:
        """Run one member; returns its accuracy, for an optimising sweeper (NaN: none)."""
        result = self._result(job)
        self.record(result)
        after = self._summary(result)["after"]
        return number(after["accuracy"]) if after else math.nan

    def _result(self, job: Job) -> Result:
        swept = self._swept(job)
        try:
            use_again(self._plugins)  # in another process none has been run yet
            config = self._config(job)
        except OpsdError as error:
            self._say(job, swept, "")
            return Result(self._name(job, swept), swept, _tell(error))
        found = find_same(self._earlier, plain_tree(config), swept=self._line.swept_keys)
        if found is not None and found.is_taken:
            result = Result(found.name, swept, found.code)
            self._say(job, swept, f"finished before, taken as it is: {self._outcome(result)}")
            return result
        with self._place():
            return self._run(job, config, found, swept)

    def needs_a_process(self, job: Job) -> bool:
        """Whether there is anything to run; asked of members whose settings have been checked."""
        found = find_same(self._earlier, job.tree, swept=self._line.swept_keys)
        return found is None or not found.is_taken

    def _swept(self, job: Job) -> tuple[str, ...]:
        return tuple(o for o in job.overrides if o.split("=", 1)[0].lstrip("+") in self._line.swept_keys)

    def _config(self, job: Job) -> Config:
        tree = {**job.tree, "run": {**job.tree["run"], "root": str(self._folder)}}
        cap_completions(tree, typed=self._line.typed_keys)
        return config_of(tree)

    def record(self, result: Result) -> None:
        with open(self._folder / MEMBERS, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def _run(self, job: Job, config: Config, found: Earlier | None, swept: Sequence[str]) -> Result:
        if self._stopped or (self._places is not None and self._places.is_stopped):
            return Result(found.name if found else self._name(job, swept), swept, NOT_RUN)
        if found is not None and found.state == "running":
            self._say(job, swept, f"runs in another process ({shell_path(self._folder / found.name)}); left alone")
            return Result(found.name, swept, NOT_RUN)
        continues = found is not None and found.state == "begun" and not found.why_again
        if found is not None and not continues:
            self._set_aside(found.name)
        name = found.name if found is not None and continues else self._name(job, swept)
        again = "continues from its last checkpoint" if continues else f"again: {found.why_again}" if found else ""
        self._say(job, swept, again)
        code = self._start(job, config, name, continues=continues)
        self._stopped |= code in STOPPED
        result = Result(name, swept, code)
        if self._quiet:
            self._say(job, swept, self._outcome(result))
        return result

    def _start(self, job: Job, config: Config, name: str, *, continues: bool) -> int:
        try:
            if continues:
                trusts = {"model.trust_remote_code": True} if config.model.trust_remote_code else {}
                return resume_run(
                    self._folder / name, argv=self._command, changes=trusts, check=config_of, open_display=self._display
                )
            config = replace(config, run=replace(config.run, name=name))
            return start_run(
                config, task=self._task, argv=self._command, hint=name, open_display=self._display, chosen=job.chosen
            )
        except OpsdError as error:
            return _tell(error)

    def _display(self, run: Path, *, quiet: bool) -> Display:
        return open_display(run, quiet=quiet or self._quiet)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self._places is None:
            yield
            return
        with self._places.take():
            yield

    def _name(self, job: Job, swept: Sequence[str]) -> str:
        """A folder name inside the sweep's folder, whatever was typed or swept over."""
        name = job.subfolder
        if name is None and "run.name" in self._line.swept_keys:
            name = str(job.tree["run"]["name"])
        elif name is None:
            name = "_".join([str(job.number), *(text.split("=", 1)[1] for text in swept)])
        name = safe_name(name)
        is_taken = (self._folder / name).exists()
        if self._places is not None:  # another process may be about to make it
            with contextlib.suppress(FileNotFoundError):
                try:
                    (self._places.folder / f"name {name}").touch(exist_ok=False)
                except FileExistsError:
                    is_taken = True
        return f"{name}_{job.number}" if is_taken else name

    def _set_aside(self, name: str) -> None:
        (self._folder / ASIDE).mkdir(exist_ok=True)
        place = 1
        while (path := self._folder / ASIDE / f"{name}-{place}").exists():
            place += 1
        (self._folder / name).rename(path)

    def _say(self, job: Job, swept: Sequence[str], what: str) -> None:
        about = " ".join(filter(None, [f"{job.number + 1}/{self._count}", *swept]))
        say(f"{about}{': ' if what else ''}{what}")

    def _summary(self, result: Result) -> dict[str, Any]:
        return summarise(read_events(RunFolder(self._folder / result.name).events), command={})

    def _outcome(self, result: Result) -> str:
        if result.code:
            return "stopped" if result.code in STOPPED else f"failed, exit code {result.code}"
        ends = [self._summary(result)[end] for end in ("before", "after")]
        return " -> ".join(interval(end) for end in ends if end) or "done"


def _tell(error: OpsdError) -> int:
    for problem in str(error).splitlines():
        say(problem)
    return int(error.exit_code)


def run_beside_each_other(runner: Runner, jobs: Iterable[Job], places: Places) -> None:
    """Run every member in a process of its own, as many at once as there are places."""
    context, waiting = multiprocessing.get_context("spawn"), deque(jobs)
    running: dict[Any, tuple[multiprocessing.context.SpawnProcess, Job]] = {}
    with places.passing_signals_on(say):
        while running or (waiting and not places.is_stopped):
            while waiting and len(running) < places.runs and not places.is_stopped:
                job = waiting.popleft()
                if not runner.needs_a_process(job):
                    runner.run(job)
                    continue
                process = context.Process(target=_member, args=(runner, job, os.getpid()))
                process.start()
                running[process.sentinel] = (process, job)
            for sentinel in wait(list(running), timeout=0.5):
                process, job = running.pop(sentinel)
                process.join()
                if process.exitcode:  # it has recorded nothing
                    runner.record(Result(f"{job.number}", job.overrides, int(ExitCode.BUG)))
        for job in waiting:
            runner.run(job)  # records that it did not run


def say(text: str) -> None:
    print(f"opsd: {text}", file=sys.stderr, flush=True)


def _member(runner: Runner, job: Job, parent: int) -> None:
    """In a process of its own, which Ctrl-C reaches through the sweep's process only."""
    os.setsid()
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until there is something to save
    runner.run(job)
