"""Arms of a comparison beside each other: the same recipe with another context or method, over the same seeds, at equal
updates, tokens or seconds; paired problem by problem and seed by seed, and a verdict in words, so that nobody claims a
gain that a control gives too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from opsd_cli.insight.estimates import Estimate, crossed, points
from opsd_cli.insight.history import History
from opsd_cli.run.evaluations import completions_file, read_completions
from opsd_cli.run.events import number

Basis = Literal["updates", "tokens", "seconds"]
COSTS = {"tokens": "tokens/completion", "seconds": "time/step"}
CONTROLS = ("shuffled", "none", "op2sd", "no_reference")
"""Arms that show nothing of a problem's reference: what they give too is no merit of it."""
MISLEADING = "wrong"
"""The reference with another final answer: says whether it is the steps that teach, and refutes nothing."""


@dataclass(frozen=True)
class Member:
    """One finished run of an arm, at the evaluation that is compared."""

    arm: str
    seed: int
    step: int
    costs: Mapping[str, float]  # tokens and seconds of training until then
    before: Mapping[str, float]  # problem -> share of its completions that are right
    after: Mapping[str, float]
    retention: tuple[float, float] | None  # at both ends of the run


@dataclass(frozen=True)
class ArmResult:
    """An arm over its seeds."""

    name: str
    seeds: tuple[int, ...]
    before: float
    after: float
    least: float  # of the seeds' accuracies after
    most: float
    gain: Estimate  # over the start, problems and seeds a sample
    behind: Estimate | None  # of the first arm over this one; None for the first, and without a common seed
    retention: tuple[float, float] | None
    step: float
    tokens: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All arms, and what they say together."""

    basis: Basis
    budget: float | None  # tokens or seconds that every run had at most
    arms: tuple[ArmResult, ...]
    missing: tuple[str, ...]  # runs that did not finish, or whose completions are gone, in words
    headline: str
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_arms(runs: Mapping[str, Mapping[int, History | None]], *, basis: Basis, split: str) -> Comparison:
    """`runs` are by arm and seed, None where there is none; the first arm is the one that the others are held against.
    At equal tokens or seconds each run counts at its last evaluation within the smallest total of all."""
    finished = {
        (arm, seed): run
        for arm, seeds in runs.items()
        for seed, run in seeds.items()
        if run is not None and run.state == "completed"
    }
    missing = [
        f"{arm}, seed {seed}: {'not run' if run is None else run.state}"
        for arm, seeds in runs.items()
        for seed, run in seeds.items()
        if (arm, seed) not in finished
    ]
    budget = None if basis == "updates" else min((_spent(run)[-1][1][basis] for run in finished.values()), default=0.0)
    measured = [_member(arm, seed, run, basis, budget, split) for (arm, seed), run in finished.items()]
    members = [one for one in measured if one.before and one.after]
    missing += [
        f"{one.arm}, seed {one.seed}: no completions of the {split} split in its folder evaluations"
        for one in measured
        if one not in members
    ]
    by_arm = {arm: {one.seed: one for one in members if one.arm == arm} for arm in runs}
    named = [arm for arm, found in by_arm.items() if found]
    first = by_arm[named[0]] if named and named[0] == next(iter(runs)) else {}
    results = tuple(_result(arm, by_arm[arm], {} if arm == next(iter(runs)) else first) for arm in named)
    headline, reasons = _verdict(results, next(iter(runs)))
    return Comparison(basis, budget, results, tuple(missing), headline, reasons)


def _spent(run: History) -> list[tuple[int, dict[str, float]]]:
    """After each step, and before the first: what training has cost until then."""
    spent, costs = [(0, dict.fromkeys(COSTS, 0.0))], dict.fromkeys(COSTS, 0.0)
    for event in run.steps:
        costs = {name: costs[name] + number(event["metrics"].get(metric, 0.0)) for name, metric in COSTS.items()}
        spent.append((event["step"], costs))
    return spent


def _member(arm: str, seed: int, run: History, basis: Basis, budget: float | None, split: str) -> Member:
    spent = dict(_spent(run))
    measured = [event for event in run.of_kind("evaluation") if event["role"] == "student" and event["split"] == split]
    steps = [event["step"] for event in measured if event["step"] in spent]
    allowed = [step for step in steps if budget is None or spent[step][basis] <= budget]
    step = max(allowed, default=min(steps, default=0))
    kept = [event["accuracy"] for event in run.of_kind("evaluation") if event["split"] == "retention"]
    return Member(
        arm, seed, step, spent.get(step, dict.fromkeys(COSTS, 0.0)), _grades(run, min(steps, default=0), split),
        _grades(run, step, split), (kept[0], kept[-1]) if len(kept) > 1 else None,
    )  # fmt: skip


def _grades(run: History, step: int, split: str) -> dict[str, float]:
    file = completions_file(run.folder, step=step, split=split, role="student")
    return {problem: line["share"] for problem, line in read_completions(file).items()}


def _result(name: str, members: Mapping[int, Member], first: Mapping[int, Member]) -> ArmResult:
    each = list(members.values())
    after = [_accuracy(one.after) for one in each]
    gain = _difference([(one.before, one.after) for one in each])
    assert gain is not None, "a run measures the same problems before and after, and all seeds the same"
    common = [(members[seed].after, first[seed].after) for seed in members if seed in first]
    kept = [one.retention for one in each if one.retention is not None]
    retention = (_mean([a for a, _ in kept]), _mean([b for _, b in kept])) if kept else None
    return ArmResult(
        name, tuple(members), _mean([_accuracy(one.before) for one in each]), _mean(after), min(after), max(after),
        gain, _difference(common) if common else None, retention, _mean([one.step for one in each]),
        *(_mean([one.costs[cost] for one in each]) for cost in COSTS),
    )  # fmt: skip


def _difference(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> Estimate | None:
    """Of the second over the first, over the problems that all have."""
    problems = [name for name in pairs[0][0] if all(name in some for pair in pairs for some in pair)]
    return crossed([[b[name] - a[name] for a, b in pairs] for name in problems])


def _accuracy(grades: Mapping[str, float]) -> float:
    return sum(grades.values()) / len(grades)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _verdict(results: Sequence[ArmResult], main: str) -> tuple[str, tuple[str, ...]]:
    """What may be claimed of the first arm, and why."""
    first = next((one for one in results if one.name == main), None)
    if first is None:
        return f"Nothing can be said: no run of {main} has finished", ()
    reasons = []
    gains, loses = first.gain.low > 0, first.gain.high < 0
    does = "gains" if gains else "loses" if loses else "does not surely change"
    reasons.append(f"{main} {does}: {points(first.gain)} over its start")
    controls = [one for one in results if one.name in CONTROLS and one is not first]
    beaten = True
    for one in controls:
        if one.behind is None:
            reasons.append(f"{main} against {one.name} (control): not compared, no seed of both has finished")
            continue
        better = one.behind.low > 0
        beaten &= better
        so = "more than this control" if better else "the control does as well, within noise"
        reasons.append(f"{main} against {one.name} (control): {points(one.behind)}: {so}")
    for one in results:
        if one is first or one in controls or one.behind is None:
            continue
        so = "better" if one.behind.low > 0 else "worse" if one.behind.high < 0 else "no difference beyond noise"
        if one.name == MISLEADING and one.behind.high >= 0:
            so = (
                "the reference's final answer matters"
                if one.behind.low > 0
                else "the steps teach, not the final answer"
            )
        reasons.append(f"{main} against {one.name}: {points(one.behind)}: {so}")
    if len(first.seeds) < 2:
        reasons.append("a single seed: what another would have given is not in these intervals; use seeds=3")
    if not gains:
        return f"No gain can be claimed for {main}", tuple(reasons)
    if not controls:
        return f"{main} gains, and no control says whether the reference does it: add shuffled to the arms", tuple(
            reasons
        )
    if not beaten:
        return f"No gain can be claimed for {main}: a control gives it too", tuple(reasons)
    if unpaired := [one.name for one in controls if one.behind is None]:
        return f"No gain can be claimed for {main} yet: no seed of it and of {unpaired[0]} has finished", tuple(reasons)
    return f"{main} gains what its controls do not give", tuple(reasons)
