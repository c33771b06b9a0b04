"""Whether a run came to what its recipe says it should: the figures that a recipe carries, with their tolerance, beside
those of a run; or why the two cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opsd_cli.insight.history import History
from opsd_cli.settings.resume_rules import changed_keys, identity_of
from opsd_cli.settings.trees import leaves

Verdict = Literal["within", "off", "not comparable"]
SECTION = "expected."
ALSO = ("train.steps", "train.seconds")  # which a resume may change, and a figure depends on
FREE = ("zero.",)  # how a run is sharded changes no figure beyond rounding
DATE = "prompts.date"
MOST_REASONS = 6  # keys that are named


@dataclass(frozen=True)
class Figure:
    """One figure of a recipe beside a run's."""

    name: str
    expected: float
    tolerance: float
    found: float | None  # None: the run has no such figure

    @property
    def is_within(self) -> bool:
        return self.found is not None and abs(self.found - self.expected) <= self.tolerance


@dataclass(frozen=True)
class Check:
    run: str
    verdict: Verdict
    reasons: tuple[str, ...]  # why not comparable
    figures: tuple[Figure, ...]
    source: str


def check_run(run: History, recipe: Mapping[str, Any] | None) -> Check:
    """Compare a run with what is expected of `recipe`: its tree as it composes by itself, None where the run was made
    from none that is here."""
    if recipe is None:
        return Check(run.name, "not comparable", ("the run was made from no recipe that is found here",), (), "")
    said = {key.removeprefix(SECTION): value for key, value in leaves(recipe) if key.startswith(SECTION)}
    if not said.get("figures"):
        return Check(run.name, "not comparable", ("its recipe carries no expected figures",), (), "")
    figures = tuple(_figure(run, text) for text in said["figures"])
    reasons = tuple(why_not_comparable(run, recipe, said))
    verdict: Verdict = "not comparable" if reasons else "within" if all(f.is_within for f in figures) else "off"
    return Check(run.name, verdict, reasons, figures, str(said.get("source") or ""))


def why_not_comparable(run: History, recipe: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """What is different about a run, beside its result."""
    reasons = []
    if run.state != "completed":
        reasons.append(f"the run is {run.state}, not completed")
    if (steps := run.summary["steps"]) < (meant := run.settings.get("train.steps", 0)):
        reasons.append(f"fewer steps: {steps} of {meant}")
    reasons += _other_settings(run, recipe)
    started = next(iter(run.of_kind("run_started")), {})
    versions = started.get("versions")
    facts = {
        "version": ("opsd", versions.get("opsd") if isinstance(versions, Mapping) else None),
        "model": ("model weights", started.get("model_fingerprint")),
        "dataset": ("data", started.get("dataset_fingerprint")),
    }
    for key, (what, found) in facts.items():
        if said.get(key) is not None and found != said[key]:
            has = "the run does not record which" if not found else f"{str(found)[:20]} in the run"
            reasons.append(f"other {what}: {has}, {str(said[key])[:20]} in the recipe")
    after = run.summary["after"]
    if said.get("problems") is not None and after and after["problems"] != said["problems"]:
        reasons.append(f"{after['problems']} problems evaluated, {said['problems']} in the recipe")
    return reasons


def _other_settings(run: History, recipe: Mapping[str, Any]) -> list[str]:
    was, own = dict(leaves(recipe)), identity_of(recipe)
    if own.get(DATE) is None:
        own.pop(DATE, None)  # the day the run began, which a run keeps and a recipe leaves open
    now = {key: run.settings.get(key) for key in own}
    changed = [change for change in changed_keys(own, _as_json(now)) if not change.startswith(FREE)]
    changed += [
        f"{key} ({was[key]!r} -> {run.settings.get(key)!r})" for key in ALSO if was[key] != run.settings.get(key)
    ]
    if not changed:
        return []
    more = f" and {len(changed) - MOST_REASONS} more" if len(changed) > MOST_REASONS else ""
    return [f"other settings than the recipe's: {', '.join(changed[:MOST_REASONS])}{more}"]


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _figure(run: History, text: str) -> Figure:
    """From NAME=VALUE+-TOLERANCE."""
    name, _, numbers = text.partition("=")
    value, _, tolerance = numbers.partition("+-")
    found = run.summary.get(name)
    measured = found["accuracy"] if isinstance(found, Mapping) else found
    return Figure(name, float(value), float(tolerance), None if measured is None else float(measured))
