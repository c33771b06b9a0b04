"""The crash matrix: a run is killed (kill -9), asked to stop, or meets a full disk at a point of its life; it is
continued; and its weights, metrics, events, samples and summary must equal those of a run that was never interrupted.

    python scripts/crash_matrix.py                   # everything: over 100 kills, every phase stopped, every save full
    python scripts/crash_matrix.py --sample 6        # a few of each family, chosen by --seed
    python scripts/crash_matrix.py --only kill

Prints a table of figures; the exit code is 1 if anything differs. The points are those of
opsd_cli/testing/fault_points.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from crash.runs import COUNTS, attempt, copy_start, differences, make_run, preload  # noqa: E402

from opsd_cli.run.folder import RunFolder  # noqa: E402
from opsd_cli.testing.fault_points import POINTS  # noqa: E402

OCCURRENCES = 4  # kills at each point, spread over the times it is reached
KILLED, TERMINATED, ENVIRONMENT, DONE = -9, 143, 3, 0


@dataclass(frozen=True)
class Case:
    """Faults of the attempts one after the other, each with the exit code it must end in; a last attempt has none."""

    family: str
    faults: tuple[str, ...]
    code: int
    ranks: int = 1

    @property
    def name(self) -> str:
        return f"{self.family} {' then '.join(self.faults)}" + (f" on {self.ranks} ranks" if self.ranks > 1 else "")


@dataclass
class Figures:
    """What became of the cases of one family."""

    cases: int = 0
    attempts: int = 0
    points: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


def spread(count: int, number: int) -> list[int]:
    """At most `number` different occurrences among `count`, the first and the last among them."""
    if count <= number:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (number - 1)) for i in range(number)})


def cases_of(reached: dict[str, int]) -> list[Case]:
    """Every case, from how often an uninterrupted run reaches each point."""
    reached["lines.half"] -= 10  # how many lines say where a phase stands depends on the clock
    kills = [
        Case("kill", (f"kill@{point}:{n}",), KILLED)
        for point, count in reached.items()
        for n in spread(count, OCCURRENCES)
    ]
    resumes = [point for point in POINTS if point.startswith("resume.")]
    in_a_resume = [
        *resumes,
        "save.renamed",
        "save.rename",
        "save.pruned",
        "step.scored",
        "lines.half",
        "export.weights",
    ]
    twice = [
        Case("kill twice", (f"kill@{first}", f"kill@{point}:1"), KILLED)
        for first in ("step.teacher_moved:4", "save.renamed:2", "lines.half:44")
        for point in in_a_resume
    ]
    phases = [point for point in reached if not point.startswith(("export.", "end."))]
    stops = [Case("stop", (f"term@{point}:{n}",), TERMINATED) for point in phases for n in spread(reached[point], 2)]
    saves = [point for point in reached if point in FULL]
    full = [
        Case("full disk", (f"enospc@{point}:{n}",), ENVIRONMENT) for point in saves for n in spread(reached[point], 2)
    ]
    pairs = [
        *[Case("two ranks", (f"rank1:kill@{point}:2",), KILLED, 2) for point in ("step.scored", "save.engine")],
        *[
            Case("two ranks", (f"rank{rank}:enospc@{point}:{n}",), ENVIRONMENT, 2)
            for rank, point in ((0, "save.file"), (1, "save.file"), (1, "save.teacher"), (0, "save.state"))
            for n in (1, 3)
        ],
        Case("two ranks", ("rank1:term@step.scored:5",), TERMINATED, 2),
    ]
    return [*kills, *twice, *stops, *full, *pairs]


FULL = frozenset({"lines.half", "end.summary"} | {name for name in POINTS if name.startswith(("save.", "export."))})
"""Points at which a disk can be full: something is being written."""


def carry_out(case: Case, whole: RunFolder, folder: Path) -> tuple[list[str], int]:
    """Do what the case says and continue the run to its end; what is wrong, and how many attempts it took."""
    run = copy_start(whole, folder)
    for number, fault in enumerate(case.faults, start=1):
        codes = attempt(run, fault, ranks=case.ranks)
        if case.code == TERMINATED and not any(codes):  # asked when all that was left was to write the model: it has
            return differences(whole, run), number
        if any(code != case.code for code in codes):
            return [f"attempt {number} ended in {codes}, not {case.code}; {last_words(run)}"], number
        if case.code == ENVIRONMENT and list(run.path.rglob("*.part")):
            return ["a temporary folder was left on a full disk"], number
    codes = attempt(run, ranks=case.ranks)
    attempts = len(case.faults) + 1
    if any(codes):
        return [f"the continued run ended in {codes}; {last_words(run)}"], attempts
    return differences(whole, run, stopped=case.code == TERMINATED), attempts


def last_words(run: RunFolder) -> str:
    """What rank 0 said last."""
    for path in (*run.logs.glob("rank_*.error"), run.crash, *run.logs.glob("rank_*.log")):
        lines = path.read_text().strip().splitlines() if path.is_file() else []
        if lines:
            return f"{path.name}: {lines[-1][:300]}"
    return "it said nothing"


def chosen(cases: list[Case], sample: int | None, seed: int) -> list[Case]:
    """All cases, or `sample` of each family."""
    if sample is None:
        return cases
    families: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        families[case.family].append(case)
    draw = random.Random(seed)
    return [case for members in families.values() for case in draw.sample(members, min(sample, len(members)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="cases of each family; all of them without it")
    parser.add_argument("--steps", type=int, default=8, help="of the run; at least 4")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", help="the families whose name starts so")
    parser.add_argument("--case", help="the cases whose name holds this")
    parser.add_argument("--list", action="store_true", help="name the cases")
    arguments = parser.parse_args()
    preload()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="opsd-crash-") as root:
        wholes = {1: make_run(Path(root) / "whole-1", arguments.steps)}
        cases = [c for c in cases_of(uninterrupted(wholes[1], 1)) if c.family.startswith(arguments.only or "")]
        cases = [c for c in chosen(cases, arguments.sample, arguments.seed) if (arguments.case or "") in c.name]
        if arguments.list:
            print("\n".join(case.name for case in cases))
            return 0
        figures = {case.family: Figures() for case in cases}
        if any(case.ranks == 2 for case in cases):
            wholes[2] = make_run(Path(root) / "whole-2", arguments.steps)
            uninterrupted(wholes[2], 2)
        for number, case in enumerate(cases):
            folder = Path(root) / f"case-{number}"
            wrong, attempts = carry_out(case, wholes[case.ranks], folder)
            add(figures[case.family], case, wrong, attempts)
            print(
                f"{'DIFFERS' if wrong else 'equal':8}{case.name}" + "".join(f"\n        {w}" for w in wrong), flush=True
            )
            shutil.rmtree(folder)
    return print_figures(figures, seconds=time.monotonic() - start)


def uninterrupted(run: RunFolder, ranks: int) -> dict[str, int]:
    """Let a run go through that nothing happens to; how often it reached each point."""
    never = "kill@load.data:1000000"  # armed, so that points are counted and lines are written in halves
    codes = attempt(run, never, ranks=ranks)
    assert not any(codes), f"the uninterrupted run ended in {codes}: {last_words(run)}"
    reached: dict[str, int] = json.loads((run.path / COUNTS).read_text())
    return reached


def add(figures: Figures, case: Case, wrong: list[str], attempts: int) -> None:
    figures.cases += 1
    figures.attempts += attempts
    figures.points |= {fault.partition("@")[2].partition(":")[0] for fault in case.faults}
    figures.failures += [case.name] if wrong else []


def print_figures(figures: dict[str, Figures], *, seconds: float) -> int:
    print(f"\n{'family':12}{'cases':>7}{'points':>8}{'attempts':>10}{'equal':>7}{'differ':>8}")
    for family, made in figures.items():
        failed = len(made.failures)
        print(f"{family:12}{made.cases:7}{len(made.points):8}{made.attempts:10}{made.cases - failed:7}{failed:8}")
    total, failed = sum(f.cases for f in figures.values()), sum(len(f.failures) for f in figures.values())
    print(f"\n{total} cases in {seconds:.0f} s; {failed} differ from the run that was never interrupted")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
