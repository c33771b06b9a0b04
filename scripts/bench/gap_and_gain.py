"""Whether the gap between teacher and student before training predicts what training gains (2605.30070), over runs.

    python scripts/bench/gap_and_gain.py runs/compare_quickstart_... [FOLDER ...] [--png FILE]

Every finished run below the folders that measured student and teacher before training and the student after it is a
point: gap = teacher before - student before, gain = student after - student before. Printed: the points, the
correlation, and the line through them by least squares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, linear_regression

from matplotlib.figure import Figure

from opsd_cli.insight.history import History, read_all


@dataclass(frozen=True)
class Point:
    """One run, in points of accuracy."""

    model: str
    arm: str
    seed: int
    gap: float
    gain: float


def point_of(run: History) -> Point | None:
    """None for a run that has not measured both roles before and the student after, or has no teacher."""
    told = run.summary
    if run.state != "completed" or run.settings.get("teacher.name") == "none":
        return None
    figures = [told.get(name) for name in ("before", "teacher_before", "after")]
    if any(figure is None for figure in figures):
        return None
    before, teacher, after = (100 * figure["accuracy"] for figure in figures)
    control = str(run.settings.get("context.control"))
    context = str(run.settings.get("context.name")) if control == "none" else control
    model = str(run.settings.get("model.path")).rpartition("/")[2].removeprefix("bundled:")
    return Point(model, context, int(run.settings.get("run.seed", 0)), teacher - before, after - before)


def draw(points: Sequence[Point], path: Path) -> None:
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for model in sorted({point.model for point in points}):
        some = [point for point in points if point.model == model]
        axes.scatter([point.gap for point in some], [point.gain for point in some], label=model, s=22)
        for arm in {point.arm for point in some}:
            at = next(point for point in some if point.arm == arm)
            axes.annotate(arm, (at.gap, at.gain), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(0.15)
    axes.axline((0, 0), slope=1, color="0.7", linewidth=0.8)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set(xlabel="gap before training (points)", ylabel="gain after training (points)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--png", type=Path)
    given = parser.parse_args(argv)
    found = [run for word in given.folders for run in read_all([word], root=Path("runs"))]
    points = [point for run in found if (point := point_of(run)) is not None]
    if len(points) < 2:
        print("fewer than two runs have measured both roles before training and the student after it", file=sys.stderr)
        return 2
    for point in sorted(points, key=lambda one: (one.model, -one.gap)):
        print(f"{point.model:24} {point.arm:14} seed {point.seed}  gap {point.gap:+6.1f}  gain {point.gain:+6.1f}")
    gaps, gains = [point.gap for point in points], [point.gain for point in points]
    line = linear_regression(gaps, gains)
    print(
        f"{len(points)} runs: correlation {correlation(gaps, gains):.2f}, gain = {line.slope:.2f} x gap "
        f"{line.intercept:+.1f} points"
    )
    if given.png is not None:
        draw(points, given.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
