"""One attempt at a run, new or resumed: the folder it works in, locked and cleared of earlier errors; the supervised
ranks; and the record of how it ended."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from opsd_cli.launch.devices import Device
from opsd_cli.launch.exit_messages import Explained, explain, explain_by_others
from opsd_cli.launch.rank_environ import Place
from opsd_cli.launch.supervisor import Display, Ended, Limits, RankProcess, supervise
from opsd_cli.launch.torchrun_slurm import (
    attempt_id,
    await_first_rank,
    is_attempt_of,
    launch_id,
    refuse_other_device,
    restarts,
)
from opsd_cli.launch.tracking import tracked
from opsd_cli.run.events import Event, EventLog, read_events
from opsd_cli.run.folder import (
    RunFolder,
    has_begun,
    name_taken,
    new_run_folder,
    read_command,
    safe_stem,
    write_command,
    write_config,
)
from opsd_cli.run.lock import run_lock
from opsd_cli.run.plugin_copies import copy_plugins
from opsd_cli.run.rank_errors import clear_errors
from opsd_cli.safety.secrets import redact
from opsd_cli.safety.terminal import escape_line
from opsd_cli.settings.config import Config, TrackSettings
from opsd_cli.settings.errors import ExitCode, OutsideError
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.typed_config import plain_tree


class OpenDisplay(Protocol):
    """Opens the screen of a run. A quiet one shows errors only: another rank's process shows the rest."""

    def __call__(self, run: Path, *, quiet: bool) -> Display:
        """The display that reads the events of the run folder `run`."""


@dataclass(frozen=True)
class Prepared:
    """A launch that is possible here."""

    processes: Callable[[RunFolder, str, Path], list[RankProcess]]
    device: Device
    place: Place | None = None  # of this process, if it is itself one of the ranks
    notes: tuple[str, ...] = ()  # what the user should know before the run, each in one line

    @property
    def is_follower(self) -> bool:
        """True for ranks that leave the folder, the events and the screen to rank 0."""
        return self.place is not None and self.place.rank > 0


@dataclass(frozen=True)
class Attempt:
    folder: RunFolder
    task: str
    cwd: Path
    note: str | None = None  # about the lock


@contextlib.contextmanager
def new_attempt(
    config: Config,
    prepared: Prepared,
    *,
    task: str,
    argv: Sequence[str],
    hint: str,
    chosen: Mapping[str, str | None] | None = None,
) -> Iterator[Attempt]:
    """A new, locked run folder with the frozen config. Under torchrun or srun: rank 0's, for every rank; if the ranks
    were restarted, the folder of their first start."""
    facts = chosen_options(chosen)
    place, name = prepared.place, config.run.name
    if place is not None:
        launch = launch_id(os.environ, place)
        path = _path_of_launch(config, place, hint=hint)
        name = path.name
        if prepared.is_follower:
            before = read_command(RunFolder(path))
            if before and not is_attempt_of(before.get("launch"), launch):  # rank 0 is about to say so
                raise name_taken(path)
            folder = await_first_rank(path, attempt_id(os.environ, place))
            refuse_other_device(folder, place, prepared.device)
            yield Attempt(folder, task, Path.cwd())
            return
        if (restarted := restarted_run(config, place, hint=hint)) is not None:
            with locked_attempt(restarted, prepared, argv=argv, task=task) as attempt:
                yield attempt
            return
    folder = new_run_folder(config.run.root, name=name, hint=hint)
    write_config(folder, plain_tree(with_date(replace(config, run=replace(config.run, name=folder.name)))))
    with locked_attempt(folder, prepared, argv=argv, task=task, **facts) as attempt:
        yield attempt


def chosen_options(chosen: Mapping[str, str | None] | None) -> dict[str, Any]:
    """What command.json records of the options that were chosen."""
    options = {group: option for group, option in (chosen or {}).items() if option and "/" not in group}
    return {"chosen": options} if options else {}


def restarted_run(config: Config, place: Place | None, *, hint: str) -> RunFolder | None:
    """The run folder that an earlier attempt of this launch has made, if torchrun or SLURM has started it again."""
    if place is None or not restarts(os.environ):
        return None
    folder = RunFolder(_path_of_launch(config, place, hint=hint))
    is_ours = is_attempt_of(read_command(folder).get("launch"), launch_id(os.environ, place))
    return folder if is_ours else None


def _path_of_launch(config: Config, place: Place, *, hint: str) -> Path:
    """Where all ranks of one launch expect their run."""
    name = config.run.name or safe_stem(f"{hint}-{launch_id(os.environ, place)}")
    return typed_path(config.run.root).absolute() / name


def with_date(config: Config) -> Config:
    """The config with the day of today where it has no date: a resumed run must be told the same."""
    if config.prompts.date is not None:
        return config
    return replace(config, prompts=replace(config.prompts, date=datetime.now().date().isoformat()))


@contextlib.contextmanager
def locked_attempt(
    folder: RunFolder, prepared: Prepared, *, argv: Sequence[str], task: str, cwd: Path | None = None, **facts: Any
) -> Iterator[Attempt]:
    """Hold the folder's lock, remove the traces of an earlier attempt, record this one."""
    cwd = cwd or Path.cwd()
    with run_lock(folder) as note:
        clear_errors(folder)
        if prepared.place:
            facts["launch"] = attempt_id(os.environ, prepared.place)
        if prepared.notes:
            facts["notes"] = list(prepared.notes)
        if plugins := copy_plugins(folder):
            facts["plugins"] = plugins
        write_command(folder, argv=argv, task=task, cwd=str(cwd), device=prepared.device, **facts)
        yield Attempt(folder, task, cwd, note)


def run_attempt(
    attempt: Attempt, prepared: Prepared, *, limits: Limits, open_display: OpenDisplay, track: TrackSettings
) -> int:
    """Start the ranks, show them to their end, show what went wrong; return the exit code."""
    folder = attempt.folder
    display = SafeDisplay(lambda: open_display(folder.path, quiet=prepared.is_follower), folder)
    with contextlib.ExitStack() as stack:
        if not prepared.is_follower and attempt.task != "check":
            stack.enter_context(tracked(folder, track, note=display.note))
        explained = _supervised(attempt, prepared, display, limits=limits)
        display.poll()
    display.close(code=int(explained.code), message=explained.message, tail=explained.tail)
    return int(explained.code)


def _supervised(attempt: Attempt, prepared: Prepared, display: SafeDisplay, *, limits: Limits) -> Explained:
    """Start the ranks, wait for their end, record it if they could not."""
    folder, before = attempt.folder, _last_end(attempt.folder)
    if not prepared.is_follower:  # rank 0 shows them for all
        for note in filter(None, [*prepared.notes, attempt.note]):
            display.note(note)
    processes = prepared.processes(folder, attempt.task, attempt.cwd)
    ended = supervise(processes, display, limits=limits)
    explained = explain(ended, folder, processes, limits)
    if prepared.place is not None:
        explained = explain_by_others(explained, ended, folder, prepared.place)
    if not prepared.is_follower:
        end = _last_end(folder)
        recorded = None if end == before else end  # by this attempt; clocks are not compared, they may jump
        if ended.how == "completed" and recorded:
            explained = Explained(recorded["exit_code"], recorded["message"] if recorded["exit_code"] else "")
        elif ended.how == "completed":  # exit code 0 alone is not trusted
            explained = Explained(ExitCode.BUG, "all ranks exited with code 0, but the run recorded no end")
        # Ranks on another machine may still be writing.
        are_gone = all(process.far is None or process.far.are_gone for process in processes)
        is_recorded = recorded is not None and recorded["exit_code"] == explained.code
        if are_gone and not is_recorded and has_begun(folder):
            _record_end(folder, ended, explained)
    return explained


def _record_end(folder: RunFolder, ended: Ended, explained: Explained) -> None:
    """Record the end of a run that could not do so itself."""
    step = next((event["step"] for event in reversed(read_events(folder.events)) if event["kind"] == "step"), 0)
    was_stopped = ended.how == "abandoned" or explained.code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
    outcome = "stopped" if was_stopped else "failed"
    with contextlib.suppress(OSError, OutsideError):  # a full disk may be why the run ended
        log = EventLog(folder.events)
        log.write("run_ended", outcome=outcome, step=step, exit_code=explained.code, message=explained.message)
        log.close()


def _last_end(folder: RunFolder) -> Event | None:
    return next((event for event in reversed(read_events(folder.events)) if event["kind"] == "run_ended"), None)


class SafeDisplay:
    """A `Display` that cannot harm a run: if the one that `open_display` opens raises, the traceback goes to
    `logs/display.txt`, the screen falls silent, and the last message is printed plainly."""

    def __init__(self, open_display: Callable[[], Display], folder: RunFolder) -> None:
        self._folder = folder
        self._display: Display | None = None
        with self:
            self._display = open_display()

    def poll(self) -> None:
        with self:
            if self._display is not None:
                self._display.poll()

    def note(self, text: str) -> None:
        with self:
            if self._display is not None:
                self._display.note(text)
                return
        self._print(text)

    def leave(self, text: str) -> None:
        with self:
            if self._display is not None:
                self._display.leave(text)
                return
        self._print(text)

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        with self:
            if self._display is not None:
                self._display.close(code=code, message=message, tail=tail)
                return
        for line in message.splitlines():
            self._print(line)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._display = None
        with contextlib.suppress(OSError):  # a full disk may be what is wrong
            path = self._folder.logs / "display.txt"
            path.write_text(redact("".join(traceback.format_exception(error))), encoding="utf-8", errors="replace")
        self._print(f"the display failed ({type(error).__name__}) and is off; the run goes on: opsd watch RUN shows it")
        return True

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # no stderr, or a closed one
            print(f"opsd: {redact(escape_line(text))}", file=sys.stderr, flush=True)
