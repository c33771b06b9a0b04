"""One frame of the live display: a `RunView` drawn for a width. Facts flow into as many lines as the width needs, so
that nothing is cut at 40 columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from rich.cells import cell_len
from rich.text import Text

from opsd_cli.run.events import Event
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.ui.theme import changes, count, decimal, duration, gibibytes, percent, plural, stated
from opsd_cli.ui.view import RunView

_GAP = "   "
_SPINNER = ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\")
_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_CELLS = 24
_FRAMES_PER_SECOND = 8


def frame(view: RunView, *, name: str, width: int, now: float, unicode: bool, began: float) -> Text:
    """All lines of the display. `began`: unix seconds at which this program opened it."""
    lines = _header(view, name, width)
    if view.steps and view.task == "train":
        lines += [_bar(view, width, now, unicode, began)]
        lines += _facts(view, width, unicode)
    lines += _flow(_accuracy(view, unicode), width)
    if view.ended is None:
        lines += [_phase(view, width, now, unicode, began)]
    return Text("\n").join([Text(), *lines])


def _header(view: RunView, name: str, width: int) -> list[Text]:
    facts = [Text.assemble((f"opsd {view.task}".rstrip(), "label"), " ", (escape_controls(name), "value"))]
    if started := view.started:
        trained, parameters = started["trainable_parameters"], started["parameters"]
        share = "" if trained == parameters else f", {count(trained)} trained"
        if parameters:  # a check loads no weights
            facts.append(Text(f"{count(parameters)} parameters{share}", "label"))
        facts.append(Text(f"{plural(started['ranks'], 'rank')} on {escape_controls(started['device'])}", "label"))
    return _flow(facts, width)


def _bar(view: RunView, width: int, now: float, unicode: bool, began: float) -> Text:
    left = view.seconds_left()
    rest = f"  {duration(left)} left" if left and view.step < view.steps else ""
    label = f"  step {view.step}/{view.steps}"
    cells = max(4, width - len(label) - len(rest))
    if cells < 8:  # a visible bar is worth more than the time left
        rest, cells = "", max(4, width - len(label))
    done = int(cells * view.share_done())
    full, empty = ("━", "─") if unicode else ("#", ".")
    return Text.assemble((full * done, "bar"), (empty * (cells - done), "label"), (label, "value"), (rest, "label"))


def _facts(view: RunView, width: int, unicode: bool) -> list[Text]:
    known = view.metrics
    loss = [_fact(known, "loss/objective", "loss", decimal)]
    if unicode and width >= 60 and len(view.losses) > 2:
        loss.append(Text(curve(view.losses), "bar"))
    kl = [
        _fact(known, "kl/forward", "KL forward", decimal),
        _fact(known, "kl/reverse", "reverse", decimal),
        _fact(known, "agree/top1", "top-1 agreement", percent),
    ]
    rollouts = [
        _fact(known, "rollout/accuracy", "rollouts right", percent),
        _fact(known, "rollout/length_mean", "length", count),
        _fact(known, "rollout/truncated", "cut", percent),
    ]
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in view.phase_shares().items())
    speed = [
        _fact(known, "tokens/per_second", "tokens/s", count),
        _fact(known, "time/step", "step", duration),
        Text(shares, "label"),
        _fact(known, "memory/peak_gib", "memory", gibibytes),
    ]
    return [line for facts in (loss, kl, rollouts, speed) for line in _flow(facts, width)]


def _accuracy(view: RunView, unicode: bool) -> list[Text]:
    pair = view.first_and_last()
    if pair is None:
        return []
    first, last = pair
    arrow = "→" if unicode else "->"
    change = "" if first is last else f"{percent(first['accuracy'])} {arrow} "
    return [
        Text.assemble(("accuracy ", "label"), (change + percent(last["accuracy"]), "value")),
        Text(f"{escape_controls(last['split'])}, {plural(last['problems'], 'problem')}, step {last['step']}", "label"),
    ]


def _phase(view: RunView, width: int, now: float, unicode: bool, began: float) -> Text:
    spinner = _SPINNER[0 if unicode else 1]
    tick = spinner[int(now * _FRAMES_PER_SECOND) % len(spinner)]
    words = "starting"
    if view.progress:
        words, done, total = escape_controls(view.progress["phase"]), view.progress["done"], view.progress["total"]
        words += f" {done}/{total}" if total else f" {done}" if done else ""
    elif view.started:
        words = "training" if view.task == "train" and view.step < view.steps else "working"
    line = Text.assemble((tick, "bar"), f" {words}", (f"{_GAP}{duration(now - began)}", "label"))
    line.truncate(width, overflow="ellipsis" if unicode else "crop")
    return line


def _fact(known: dict[str, float], name: str, label: str, write: Callable[[float], str]) -> Text:
    if name not in known:
        return Text()
    return Text.assemble((f"{label} ", "label"), (write(known[name]), "value"))


def _flow(facts: Iterable[Text], width: int) -> list[Text]:
    """Facts side by side, on as many lines as needed; one that is wider than a line is folded."""
    lines: list[Text] = []
    for fact in facts:
        if not fact.plain:
            continue
        if lines and cell_len(lines[-1].plain) + len(_GAP) + cell_len(fact.plain) <= width:
            lines[-1] = Text.assemble(lines[-1], _GAP, fact)
            continue
        while cell_len(fact.plain) > width:
            lines.append(fact[:width])
            fact = fact[width:]
        lines.append(fact)
    return lines


def curve(values: Sequence[float]) -> str:
    """The finite values as a line of blocks, oldest left, each cell the mean of its share."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    cells = min(_CURVE_CELLS, len(finite))
    edges = [round(index * len(finite) / cells) for index in range(cells + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in means)


def lasting_line(event: Event) -> Text | None:
    """What an event leaves above the live display; None for one that only changes the frame."""
    kind = event["kind"]
    if kind == "run_started" and event["task"] != "check":  # a check's plan is its result
        return Text("\n".join(escape_controls(line) for line in event["plan"]), "label") if event["plan"] else None
    if kind == "warning":
        return Text.assemble(("warning: ", "warn"), escape_controls(event["message"]))
    if kind == "checkpoint":
        return Text(f"step {event['step']}: checkpoint saved in {duration(event['seconds'])}", "label")
    if kind == "comparison":
        since = " against the student's" if event["name"] == "teacher" else f" since step {event['since']}"
        return Text(f"  {changes(event, since=since)}", "label")  # below the evaluation, which comes just before it
    if kind == "evaluation":
        what = escape_controls(f"{event['split']} accuracy, {event['role']} prompt")
        interval = f"[{100 * event['low']:.1f}, {100 * event['high']:.1f}]"
        return Text.assemble(
            (f"step {event['step']}: {what} ", "label"),
            (f"{percent(event['accuracy'])} ", "value"),
            (
                f"{interval} {event['correct']}/{event['problems']}{stated(event)} in {duration(event['seconds'])}",
                "label",
            ),
        )
    return None
