"""One attempt at a run: the folder it works in, locked and cleared of earlier errors; the supervised ranks;
and the words for how it ended. Owns the order of these steps, for a new run, a resumed one, and ranks of an
outer launcher.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from opsd_cli.launch.devices import Device
from opsd_cli.launch.exit_messages import Explained, explain
from opsd_cli.launch.machine import Place
from opsd_cli.launch.remote_rank import STOP_FILE
from opsd_cli.launch.safe_display import Shielded
from opsd_cli.launch.supervisor import Display, Ended, Limits, RankProcess, supervise
from opsd_cli.launch.torchrun_slurm import await_first_rank, is_restart, launch_id, refuse_other_device
from opsd_cli.run.events import Event, EventLog, read_events
from opsd_cli.run.folder import (
    RunFolder,
    clear_errors,
    has_begun,
    new_run_folder,
    read_command,
    safe_stem,
    write_command,
    write_config,
)
from opsd_cli.run.lock import lock_run
from opsd_cli.settings.config import Config, plain_tree
from opsd_cli.settings.errors import ExitCode, OutsideError


class OpenDisplay(Protocol):
    """Makes the screen of a run. A quiet one shows errors only: another rank's process shows the rest."""

    def __call__(self, run: Path, *, quiet: bool) -> Display:
        """The display that reads the events of the run folder `run`."""


@dataclass(frozen=True)
class Prepared:
    """A launch that is known to be possible. `place` is set when this process is itself one of the ranks."""

    processes: Callable[[RunFolder, str, Path], list[RankProcess]]
    device: Device
    place: Place | None = None
    notes: tuple[str, ...] = ()  # what the user should know before the run, each in one line

    @property
    def is_follower(self) -> bool:
        """True for ranks that leave the folder, the events and the screen to rank 0."""
        return self.place is not None and self.place.rank > 0


@dataclass(frozen=True)
class Attempt:
    """A locked run folder, what is to be done in it, and from which working directory."""

    folder: RunFolder
    task: str
    cwd: Path
    note: str | None = None  # what the lock has to say


@contextlib.contextmanager
def new_attempt(config: Config, prepared: Prepared, *, task: str, argv: Sequence[str], hint: str) -> Iterator[Attempt]:
    """A new, locked run folder with the frozen config. Under an outer launcher: rank 0's, for every rank.

    When the outer launcher has restarted the ranks, the folder of their first start is continued.
    """
    place, name = prepared.place, config.run.name
    if place is not None:
        launch = launch_id(os.environ, place)
        name = name or safe_stem(f"{hint}-{launch}")
        path = Path(config.run.root).expanduser().absolute() / name
        if prepared.is_follower:
            folder = await_first_rank(path, launch)
            refuse_other_device(folder, place, prepared.device)
            yield Attempt(folder, task, Path.cwd())
            return
        if is_restart(os.environ) and read_command(RunFolder(path)).get("launch") == launch:
            with locked(RunFolder(path), prepared, argv=argv, task=task) as attempt:
                yield attempt
            return
    folder = new_run_folder(config.run.root, name=name, hint=hint)
    write_config(folder, plain_tree(replace(config, run=replace(config.run, name=folder.name))))
    with locked(folder, prepared, argv=argv, task=task) as attempt:
        yield attempt


@contextlib.contextmanager
def locked(
    folder: RunFolder,
    prepared: Prepared,
    *,
    argv: Sequence[str],
    task: str,
    cwd: Path | None = None,
    **facts: Any,
) -> Iterator[Attempt]:
    """Hold the folder's lock, with the traces of an earlier attempt put aside and this one recorded."""
    lock = lock_run(folder)
    try:
        clear_errors(folder)
        (folder.path / STOP_FILE).unlink(missing_ok=True)
        cwd = cwd or Path.cwd()
        launch = {"launch": launch_id(os.environ, prepared.place)} if prepared.place else {}
        if prepared.notes:
            facts["notes"] = list(prepared.notes)
        write_command(folder, argv=argv, task=task, cwd=str(cwd), device=prepared.device, **facts, **launch)
        yield Attempt(folder, task, cwd, lock.note)
    finally:
        lock.release()


def carry_out(attempt: Attempt, prepared: Prepared, *, limits: Limits, open_display: OpenDisplay) -> int:
    """Start the ranks, show them to their end, show what went wrong; return the exit code."""
    folder = attempt.folder
    before = _last_end(folder)
    display = Shielded(lambda: open_display(folder.path, quiet=prepared.is_follower), folder)
    if not prepared.is_follower:  # rank 0 says it for all
        for note in filter(None, [*prepared.notes, attempt.note]):
            display.note(note)
    processes = prepared.processes(folder, attempt.task, attempt.cwd)
    ended = supervise(processes, display, limits=limits)
    explained = explain(ended, folder, processes, limits)
    if not prepared.is_follower:
        explained = _agreed(folder, ended, explained, before=before)
        if all(process.stop_file is None for process in processes):  # no rank elsewhere can still be writing
            _say_how_it_ended(folder, ended, explained, before=before)
    display.poll()
    display.close(code=int(explained.code), message=explained.message, tail=explained.tail)
    return int(explained.code)


def _agreed(folder: RunFolder, ended: Ended, explained: Explained, *, before: Event | None) -> Explained:
    """What the processes' exit codes and the run's own last word say together: exit code 0 alone is not
    trusted.
    """
    if ended.how != "completed":
        return explained
    last_word = _last_word(folder, before=before)
    if last_word is None:
        return Explained(ExitCode.BUG, "the ranks ended well, but the run did not say that it is complete")
    return Explained(last_word["exit_code"], last_word["message"] if last_word["exit_code"] else "")


def _say_how_it_ended(folder: RunFolder, ended: Ended, explained: Explained, *, before: Event | None) -> None:
    """Complete the events of a run that could not do so itself; one that had not begun stays
    without a word.
    """
    if not has_begun(folder) or _last_word(folder, before=before):
        return
    events = read_events(folder.events)
    step = next((event["step"] for event in reversed(events) if event["kind"] == "step"), 0)
    outcome = "stopped" if ended.how in ("stopped", "abandoned") else "failed"
    with contextlib.suppress(OSError, OutsideError):  # a full disk may be why the run ended
        log = EventLog(folder.events)
        log.write("run_ended", outcome=outcome, step=step, exit_code=explained.code, message=explained.message)
        log.close()


def _last_word(folder: RunFolder, *, before: Event | None) -> Event | None:
    """How this attempt says it ended; `before` is the end of the one before it. No clock is asked: it may jump."""
    end = _last_end(folder)
    return None if end == before else end


def _last_end(folder: RunFolder) -> Event | None:
    return next((event for event in reversed(read_events(folder.events)) if event["kind"] == "run_ended"), None)
