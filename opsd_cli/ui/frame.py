"""One frame of the live display: a `RunView` drawn for a terminal's size. Curves stand in as many columns as fit, facts
flow into as many lines as they need, and where the lines are too many the least important are left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from rich.cells import cell_len
from rich.text import Text

from opsd_cli.insight.samples import SampleRollout
from opsd_cli.run.events import Event
from opsd_cli.ui.inspect_text import shade
from opsd_cli.ui.lines import CURVE_CELLS, GAP, curve, flow, folded, foreign
from opsd_cli.ui.theme import changes, count, cut, decimal, duration, gibibytes, literal, percent, plural, stated
from opsd_cli.ui.view import RunView

_SPINNER = ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\")
_COLUMN = 38  # cells of a metric with its curve
_LABEL, _VALUE = 15, 8
_ROLLOUT_LINES = 6
TICKS_PER_SECOND = 2

Fact = tuple[str, str, Callable[[float], str]]
GRID: tuple[Fact, ...] = (
    ("loss/objective", "loss", decimal),
    ("kl/forward", "KL forward", decimal),
    ("kl/reverse", "KL reverse", decimal),
    ("agree/top1", "top-1 agreement", percent),
    ("entropy/student", "student entropy", decimal),
    ("entropy/teacher", "teacher entropy", decimal),
    ("entropy/gap", "entropy gap", decimal),
    ("optim/grad_norm", "gradient norm", decimal),
    ("rollout/accuracy", "rollouts right", percent),
    ("rollout/length_mean", "length", count),
    ("rollout/truncated", "cut", percent),
    ("optim/lr", "learning rate", decimal),
)
"""Metric, label, and how its value is written; in the order of columns."""
LEAST = ("optim/lr", "optim/grad_norm", "rollout/truncated", "agree/top1", "entropy/gap", "rollout/length_mean")
"""Left out of a low terminal, in this order."""


def frame(
    view: RunView,
    *,
    name: str,
    width: int,
    now: float,
    unicode: bool,
    began: float,
    height: int = 1000,
    place: str = "",
    sample: SampleRollout | None = None,
) -> Text:
    """All lines of the display. `began`: unix seconds at which this program opened it; `place`: where the run writes;
    `sample`: a rollout to show."""
    head, foot = _header(view, name, width, unicode), flow(_accuracy(view, unicode), width)
    extras: list[list[Text]] = []  # the first is left out first
    if view.ended is None:
        foot += [_phase(view, width, now, unicode, began)]
    if view.steps and view.task == "train":
        head += [_bar(view, width, now, unicode)]
        extras = [_where(place, width, unicode), flow(_speed(view), width), _guard(view, width, unicode)]
        grid = _grid(view, width, unicode, room=height - 1 - len(head) - len(foot) - sum(map(len, extras)))
        while extras and 1 + len(head) + len(grid) + sum(map(len, extras)) + len(foot) > height:
            extras.pop(0)
        used = 1 + len(head) + len(grid) + sum(map(len, extras)) + len(foot)
        rollout = [] if sample is None else rollout_lines(sample, width, unicode=unicode, room=height - used)
        head += [*grid, *(line for lines in reversed(extras) for line in lines), *rollout]
    return Text("\n").join([Text(), *head, *foot][: max(1, height)])


def _header(view: RunView, name: str, width: int, unicode: bool) -> list[Text]:
    facts = [
        Text.assemble(
            (f"opsd {foreign(view.task, 20, unicode)}".rstrip(), "label"), " ", (foreign(name, 100, unicode), "value")
        )
    ]
    if started := view.started:
        trained, parameters = started["trainable_parameters"], started["parameters"]
        share = "" if trained == parameters else f", {count(trained)} trained"
        if parameters:  # a check loads no weights
            facts.append(Text(f"{count(parameters)} parameters{share}", "label"))
        facts.append(Text(f"{plural(started['ranks'], 'rank')} on {foreign(started['device'], 60, unicode)}", "label"))
    return flow(facts, width)


def _bar(view: RunView, width: int, now: float, unicode: bool) -> Text:
    left = view.seconds_left(now=now)
    rest = f"  {duration(left)} left" if left is not None and left >= 0.5 else ""
    label = f"  step {view.step}/{view.steps}"
    cells = max(4, width - len(label) - len(rest))
    if cells < 8:  # a visible bar is worth more than the time left
        rest, cells = "", max(4, width - len(label))
    done = int(cells * view.share_done())
    full, empty = ("━", "─") if unicode else ("#", ".")
    return Text.assemble((full * done, "bar"), (empty * (cells - done), "label"), (label, "value"), (rest, "label"))


def _grid(view: RunView, width: int, unicode: bool, *, room: int) -> list[Text]:
    """Metrics with their curves, column after column."""
    columns = max(1, min(3, (width + len(GAP)) // (_COLUMN + len(GAP))))
    facts = [fact for fact in GRID if fact[0] in view.metrics]
    for name in LEAST:
        if -(-len(facts) // columns) <= room:
            break
        facts = [fact for fact in facts if fact[0] != name]
    rows = max(1, -(-len(facts) // columns))
    each = (width - (columns - 1) * len(GAP)) // columns
    lines = []
    for row in range(rows if facts else 0):
        cells = [_metric(view, fact, each, unicode) for fact in facts[row::rows]]
        for cell in cells[:-1]:
            cell.pad_right(each - cell_len(cell.plain))
        lines += [Text(GAP).join(cells)] if all(cell_len(cell.plain) <= each for cell in cells) else cells
    return [piece for line in lines for piece in folded(line, width)]


def _metric(view: RunView, fact: Fact, width: int, unicode: bool) -> Text:
    name, label, write = fact
    value = write(view.metrics[name])
    text = Text.assemble((f"{label:<{_LABEL}} ", "label"), (f"{value:>{_VALUE}}", "value"))
    room = min(CURVE_CELLS, width - len(text.plain) - 2)
    if cell_len(text.plain) > width:
        return Text.assemble((f"{label} ", "label"), (value, "value"))
    return text if not unicode or room < 6 else Text.assemble(text, "  ", (curve(view.curves[name], room), "bar"))


def _speed(view: RunView) -> list[Text]:
    known = view.metrics
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in view.phase_shares().items())
    return [
        _fact(known, "tokens/per_second", "tokens/s", count),
        _fact(known, "time/step", "step", duration),
        Text(shares, "label"),
        _fact(known, "compute/mfu", "MFU", percent)
        if "compute/mfu" in known
        else _fact(known, "compute/gflops_per_second", "GFLOP/s", lambda value: f"{value:.3g}"),
        _fact(known, "memory/peak_gib", "memory", gibibytes),
    ]


def _guard(view: RunView, width: int, unicode: bool) -> list[Text]:
    """What the guard does, and what was warned of so far."""
    action = {"off": "is off", "warn": "warns", "stop": "stops"}.get(str(view.settings.get("guard.action")), "")
    facts = [Text.assemble(("guard ", "label"), action)] if action else []
    if view.refused:
        facts.append(Text(f"{plural(view.refused, 'update')} refused", "bad"))
    if not view.warnings:
        return flow([*facts, Text("no warning so far", "label")], width) if view.metrics else []
    newest = Text(
        f"{plural(len(view.warnings), 'warning')}: {foreign(view.warnings[-1]['message'], width, unicode)}", "warn"
    )
    line = Text(GAP).join([*facts, newest])
    line.truncate(width, overflow="ellipsis" if unicode else "crop")
    return [line]


def _where(place: str, width: int, unicode: bool) -> list[Text]:
    place = foreign(place, 1000, unicode)
    words = (f"in {place}:", "events.jsonl", "samples.jsonl", "logs/rank_0.log") if place else ()
    return flow((Text(word, "label") for word in words), width, gap=" ")


def rollout_lines(sample: SampleRollout, width: int, *, unicode: bool, room: int) -> list[Text]:
    """A rollout, each token in the shade of its divergence, in at most `room` lines."""
    lines = min(room - 1, _ROLLOUT_LINES)
    if lines < 1:
        return []
    verdict = {None: "", 1.0: ", right", 0.0: ", wrong"}.get(sample.reward, "")
    losses = [token.divergence for token in sample.tokens if token.divergence is not None]
    total = f", {decimal(sum(losses))} nats" if losses else ", no loss"
    heading = Text(f"rollout of step {sample.step}{verdict}, {plural(len(sample.tokens), 'token')}{total}", "label")
    heading.truncate(width)
    text, newline, cells = Text(), "↵" if unicode else "\\n", 0
    for token in sample.tokens:
        if cells > lines * width:
            break
        parts = token.text[: lines * width].replace("\t", " ").split("\n")
        piece = newline.join(foreign(part, lines * width, unicode) for part in parts)
        text.append(piece, shade(token.divergence or 0.0))
        cells += cell_len(piece)
    found = list(itertools.islice(folded(text, width), lines + 1))
    if len(found) > lines:
        found[lines - 1].truncate(width - 4)
        found[lines - 1].append(" ...", "label")
    return [heading, *found[:lines]]


def _accuracy(view: RunView, unicode: bool) -> list[Text]:
    pair = view.first_and_last()
    if pair is None:
        return []
    first, last = pair
    arrow = "→" if unicode else "->"
    change = "" if first is last else f"{percent(first['accuracy'])} {arrow} "
    return [
        Text.assemble(("accuracy ", "label"), (change + percent(last["accuracy"]), "value")),
        Text(
            f"{foreign(last['split'], 40, unicode)}, {plural(last['problems'], 'problem')}, step {last['step']}",
            "label",
        ),
    ]


def _phase(view: RunView, width: int, now: float, unicode: bool, began: float) -> Text:
    spinner = _SPINNER[0 if unicode else 1]
    tick = spinner[int(now * TICKS_PER_SECOND) % len(spinner)]
    words = "starting"
    if view.progress:
        words, done, total = (
            foreign(view.progress["phase"], 200, unicode),
            view.progress["done"],
            view.progress["total"],
        )
        words += f" {done}/{total}" if total else f" {done}" if done else ""
    elif view.started:
        words = "training" if view.task == "train" and view.step < view.steps else "working"
    line = Text.assemble((tick, "bar"), f" {words}", (f"{GAP}{duration(now - began)}", "label"))
    line.truncate(width, overflow="ellipsis" if unicode else "crop")
    return line


def _fact(known: dict[str, float], name: str, label: str, write: Callable[[float], str]) -> Text:
    if name not in known:
        return Text()
    return Text.assemble((f"{label} ", "label"), (write(known[name]), "value"))


def lasting_line(event: Event) -> Text | None:
    """What an event leaves above the live display; None for one that only changes the frame."""
    kind = event["kind"]
    if kind == "run_started" and event["task"] != "check":  # a check's plan is its result
        return Text("\n".join(literal(line) for line in event["plan"]), "label") if event["plan"] else None
    if kind == "warning":
        return Text.assemble(("warning: ", "warn"), literal(event["message"]))
    if kind == "checkpoint":
        return Text(f"step {event['step']}: checkpoint saved in {duration(event['seconds'])}", "label")
    if kind == "comparison":
        since = " against the student's" if event["name"] == "teacher" else f" since step {event['since']}"
        return Text(f"  {changes(event, since=since)}", "label")  # below the evaluation, which comes just before it
    if kind == "evaluation":
        what = cut(f"{event['split']} accuracy, {event['role']} prompt", 100)
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
