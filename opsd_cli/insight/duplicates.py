"""Problems that a dataset holds twice, and held-out problems that training shows too."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from opsd_cli.data.problems import Problem, Splits
from opsd_cli.insight.findings import Findings

BETWEEN_WORDS = re.compile(r"\W+")


def look_for_duplicates(findings: Findings, splits: Splits) -> None:
    """Note rows that are there twice, that contradict each other, or that training and measuring share."""
    twice = repeated(splits.train)
    if twice:
        one, other = twice[0]
        message = f"{len(twice):,} of {len(splits.train):,} training problems are there twice ({one} is {other})"
        findings.add("data", "duplicates", "warning", message, "leave the second ones out: they weigh double")
    if at_odds := contradicting(splits.train):
        one, other = at_odds[0]
        message = f"questions of the training data with two different answers: {len(at_odds):,} ({one} and {other})"
        findings.add("data", "contradictions", "warning", message, "correct the wrong one of each")
    leaks = 0
    for name in ("validation", "test", "retention"):
        held_out = vars(splits)[name]
        if pairs := shared(held_out, splits.train):
            leaks += len(pairs)
            one, other = pairs[0]
            findings.add(
                "data", "leak", "warning",
                f"{len(pairs):,} of {len(held_out):,} {name} problems are training problems too ({one} is {other}): "
                "accuracy on them says nothing of new problems",
                "leave them out of the training data",
            )  # fmt: skip
    if not (twice or leaks):
        findings.add("data", "duplicates", "ok", "no problem is there twice, and none is both trained on and held out")


def same_text(problem: Problem) -> str:
    """What two rows of one problem have in common: its words, whatever their case, spaces and punctuation, and those
    of the turns before it."""
    text = " ".join((*(said for _, said in problem.earlier), problem.question))
    # Signs count where words are few: `3 + 4` and `3 * 4` are two problems.
    plain = BETWEEN_WORDS.sub(" ", text).strip().casefold()
    return plain if len(plain) >= 40 else " ".join(text.split()).casefold()


def repeated(problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """Pairs of ids: a problem, and the first one of the same question."""
    first: dict[str, str] = {}
    found = []
    for problem in problems:
        key = same_text(problem)
        if key in first:
            found.append((problem.id, first[key]))
        else:
            first[key] = problem.id
    return found


def shared(held_out: Sequence[Problem], train: Sequence[Problem]) -> list[tuple[str, str]]:
    """Pairs of ids: a held-out problem, and a training problem of the same question."""
    seen: dict[str, str] = {}
    for problem in train:
        seen.setdefault(same_text(problem), problem.id)
    return [(one.id, seen[key]) for one in held_out if (key := same_text(one)) in seen]


def contradicting(problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """Pairs of ids of the same question with different answers."""
    answers: dict[str, dict[str | None, str]] = defaultdict(dict)
    for problem in problems:
        answers[same_text(problem)].setdefault(problem.answer, problem.id)
    listed = (list(ids.values()) for ids in answers.values() if len(ids) > 1)
    return [(ids[1], ids[0]) for ids in listed]
