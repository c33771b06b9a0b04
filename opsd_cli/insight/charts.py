"""What a report draws: curves of one run, the same curves of several runs over each other, and results against the
settings that were swept. Numbers only; `ui.plots` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opsd_cli.insight.history import History
from opsd_cli.insight.samples import divergence_by_class, read_samples
from opsd_cli.insight.versus import ABSENT

Kind = Literal["line", "stack", "dots"]


@dataclass(frozen=True)
class Series:
    """One line of a chart. `low` and `high` are a 95 % interval around the values."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    smooth: bool = False  # a moving mean is drawn, the values behind it


@dataclass(frozen=True)
class Chart:
    title: str
    y_label: str
    series: Sequence[Series]
    kind: Kind = "line"
    x_label: str = "step"
    x_names: Sequence[str] = field(default_factory=tuple)  # of the places 0, 1, ... where x is no number
    logarithmic_x: bool = False


CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("What is minimised", "nats per token", {"objective": "loss/objective"}),
    (
        "Divergence of the two roles",
        "nats per token",
        {"KL(teacher‖student)": "kl/forward", "KL(student‖teacher)": "kl/reverse"},
    ),
    ("Entropy", "nats", {"student": "entropy/student", "teacher": "entropy/teacher"}),
    (
        "Shares",
        "share",
        {"top-1 agreement": "agree/top1", "rollouts right": "rollout/accuracy", "cut": "rollout/truncated"},
    ),
    ("Length of completions", "tokens", {"mean": "rollout/length_mean"}),
    ("Gradient norm before clipping", "", {"norm": "optim/grad_norm"}),
    ("Learning rate", "", {"learning rate": "optim/lr"}),
    ("Speed", "completion tokens a second", {"tokens": "tokens/per_second"}),
    ("Memory", "GiB", {"highest so far": "memory/peak_gib"}),
)
"""Title, unit, and label -> metric of each chart of one run."""

PHASES = (("sample", "time/sample"), ("score", "time/score"), ("update", "time/update"))
ACCURACIES = (
    ("held-out problems", "student", False),
    ("under the teacher's prompt", "teacher", False),
    ("retention", "student", True),
)
OVERLAID = ("loss/objective", "kl/forward", "entropy/student", "rollout/length_mean", "optim/grad_norm")
SMOOTHED = ("loss/objective", "kl/forward", "kl/reverse", "rollout/accuracy", "rollout/length_mean", "optim/grad_norm")


def charts_of(run: History) -> list[Chart]:
    """Everything about one run that has a course over its steps."""
    found = [_accuracy(run)]
    for title, unit, wanted in CURVES:
        curves = [(label, name, run.metric(name)) for label, name in wanted.items()]
        series = [Series(label, *curve, smooth=name in SMOOTHED) for label, name, curve in curves if curve[0]]
        found.append(Chart(title, unit, series))
    by_class = divergence_by_class(read_samples(run.folder.samples))
    found.append(Chart("Divergence by class of token", "nats per token", [Series(k, *v) for k, v in by_class.items()]))
    curves = [(label, name, run.metric(name)) for label, name in PHASES]
    phases = [Series(label, *curve) for label, _, curve in curves if curve[0]]
    if len({len(series.x) for series in phases}) == 1:  # stacked: each step has all
        found.append(Chart("Where the time goes", "seconds a step", phases, "stack"))
    return [chart for chart in found if any(len(series.x) > 1 for series in chart.series)]


def charts_of_all(runs: Sequence[History], *, settings: dict[str, list[Any]]) -> list[Chart]:
    """Several runs over each other, and the accuracy they ended with against each setting in which they differ."""
    held_out = [(run.name, series[0]) for run in runs if (series := _accuracy(run).series)]
    found = [Chart("Accuracy", "share", [Series(name, curve.x, curve.y) for name, curve in held_out])]
    found += [against for key, values in settings.items() if (against := _against(key, values, runs)) is not None]
    titles = {name: (title, unit) for title, unit, wanted in CURVES for name in wanted.values()}
    for name in OVERLAID:
        series = [Series(run.name, *curve, smooth=True) for run in runs if (curve := run.metric(name))[0]]
        found.append(Chart(f"{titles[name][0]}: {name}", titles[name][1], series))
    return [chart for chart in found if chart.series]


def _accuracy(run: History) -> Chart:
    series = []
    for label, role, other_skill in ACCURACIES:
        events = [event for event in run.of_kind("evaluation") if event["role"] == role]
        events = [event for event in events if (event["split"] == "retention") is other_skill]
        if events:
            steps = [event["step"] for event in events]
            series.append(_with_interval(label, steps, events))
    return Chart("Accuracy, with 95 % intervals", "share", series)


def _with_interval(label: str, x: Sequence[float], evaluations: Sequence[dict[str, Any]]) -> Series:
    y, low, high = ([evaluation[name] for evaluation in evaluations] for name in ("accuracy", "low", "high"))
    return Series(label, x, y, low, high)


def _against(key: str, values: Sequence[Any], runs: Sequence[History]) -> Chart | None:
    # A setting that only some options have is drawn for the runs that have it.
    known = [(value, run) for value, run in zip(values, runs, strict=True) if value != ABSENT]
    ends = [(value, run) for value, run in known if run.summary["after"]]
    different = list(dict.fromkeys(str(value) for value, _ in ends))
    if len(different) < 2:
        return None
    after = [run.summary["after"] for _, run in ends]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in ends)
    x = [float(value) if numeric else float(different.index(str(value))) for value, _ in ends]
    spread = numeric and min(x) > 0 and max(x) / min(x) >= 10
    dots = _with_interval("after training", x, after)
    names = () if numeric else tuple(different)
    return Chart(f"Accuracy against {key}", "share", [dots], "dots", key, names, spread)


def moving_mean(values: Sequence[float], *, share: float = 0.05) -> list[float]:
    """The mean of each value with its neighbours, over that share of all values; the window is cut at both ends."""
    half = max(1, math.ceil(share * len(values) / 2))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    edges = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in edges]
