"""The last words of a run: what came of it, where it is, what to type next. Pure: a `RunView` and a run
folder in, labelled lines out; the display decides to which stream they go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from opsd_cli.run.events import Event
from opsd_cli.run.folder import RunFolder, read_config, shown
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.terminal_text import inert
from opsd_cli.ui.theme import count, duration, percent, plural
from opsd_cli.ui.view import RunView

Lines = Iterator[tuple[str, str]]


def result_lines(view: RunView, folder: RunFolder, *, arrow: str) -> Lines:
    """Label and text of everything a finished training or check has to show."""
    if view.task == "check":
        yield from (("", inert(line)) for line in (view.started or {}).get("plan", ()))
        return
    pace = f"{count(view.tokens)} completion tokens, {duration(view.seconds)}"
    yield "trained", f"{plural(view.step, 'step')} ({pace})"
    rows = (("accuracy", "student", False), ("teacher", "teacher", False), ("retention", "student", True))
    for label, role, retention in rows:
        if pair := view.first_and_last(role, retention=retention):
            yield label, _change(*pair, arrow=arrow)
    yield from _places(folder)


def next_lines(view: RunView, folder: RunFolder) -> Lines:
    """What a person may want to type after a finished training."""
    if view.task != "train":
        return
    if folder.model.is_dir():
        yield "evaluate", f"opsd eval {shown(folder.model)}"
        yield "load", f"AutoModelForCausalLM.from_pretrained({str(folder.model)!r})"
    if _may_go_on(folder):
        yield "continue", f"{_resume(folder)} train.steps={2 * view.steps}"


def stop_line(view: RunView, folder: RunFolder, code: int) -> str:
    """The last line of a run that did not complete: what is kept, and how to go on from it."""
    if view.task not in ("train", "") or code == 2:  # its message says what to change first
        return ""
    if view.started is None:
        return "the run had not begun: nothing was saved" if code in (130, 143) else ""
    if view.checkpoint is None:
        return f"nothing was saved yet; start again with: {_resume(folder)}"
    return f"step {view.checkpoint['step']} is saved; continue with: {_resume(folder)}"


def interval(event: Event) -> str:
    """Accuracy with its 95 % interval: `31.5 % [25.4, 38.3]`."""
    return f"{percent(event['accuracy'])} [{100 * event['low']:.1f}, {100 * event['high']:.1f}]"


def _change(first: Event, last: Event, *, arrow: str) -> str:
    prompt = "under the teacher's prompt, " if last["role"] == "teacher" else ""
    what = f"({prompt}{inert(last['split'])}, {plural(last['problems'], 'problem')}, 95 % interval)"
    return f"{interval(last)} {what}" if first is last else f"{interval(first)} {arrow} {interval(last)} {what}"


def _places(folder: RunFolder) -> Lines:
    for label, path in (("model", folder.model), ("summary", folder.summary)):
        if path.exists():
            yield label, shown(path)
    yield "run", shown(folder.path)


def _resume(folder: RunFolder) -> str:
    return f"opsd train --resume {shown(folder.path)}"


def _may_go_on(folder: RunFolder) -> bool:
    """Only under a constant learning rate do more steps continue the same run."""
    with contextlib.suppress(DataError, KeyError, TypeError):
        return bool(read_config(RunFolder(Path(folder.path)))["optim"]["schedule"] == "constant")
    return False
