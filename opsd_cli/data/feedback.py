"""Privileged context made of a step's own rollouts: a correct sibling, or what a verifier says of the attempt (SDPO,
2601.20802). Owns which is shown to whom; the text around it is the context template's. The attempt itself is never
shown: that costs diversity (SDPO, table 6)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence

from opsd_cli.data.answers import extract_answer
from opsd_cli.data.privileged import Privileged
from opsd_cli.data.problems import Rollout
from opsd_cli.data.templates import SAMPLED

THINKING = re.compile(r"(</?think>)")
MAX_QUOTED_CHARS = 80
"""A longer answer is not quoted: it is no answer."""


def feedback_of(
    rollouts: Sequence[Rollout],
    correct: Sequence[bool],
    texts: Sequence[str],
    *,
    wanted: Collection[str] = SAMPLED,
) -> list[Privileged]:
    """For each rollout the first other correct completion of its problem, without its thinking (one that was cut
    only if no other is there); where there is none, a sentence about the rollout's own answer; nothing for the only
    correct one. What is not `wanted` stays empty, and stands in the way of nothing."""
    siblings = _siblings(rollouts, correct, texts) if "sibling" in wanted else [""] * len(rollouts)
    shown = []
    for rollout, right, text, sibling in zip(rollouts, correct, texts, siblings, strict=True):
        feedback = verdict(rollout, text) if "feedback" in wanted and not (sibling or right) else ""
        problem = rollout.prompt.problem
        shown.append(Privileged(problem.solution, problem.answer, sibling, feedback))
    return shown


def _siblings(rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]) -> list[str]:
    """For each rollout the text of its sibling, or nothing. A problem that a step sees twice is two problems here: both
    may be on one rank or on two, and what is shown must not depend on that."""
    families: dict[tuple[str, int], list[int]] = defaultdict(list)
    family_of = [(rollout.prompt.problem.id, rollout.place) for rollout in rollouts]
    told = [without_thinking(text) if right else "" for text, right in zip(texts, correct, strict=True)]
    for index in sorted(range(len(rollouts)), key=lambda index: rollouts[index].finish_reason == "length"):
        if told[index]:
            families[family_of[index]].append(index)
    return [
        next((told[other] for other in families[family] if other != index), "")
        for index, family in enumerate(family_of)
    ]


def without_thinking(text: str) -> str:
    """`text` without its `<think>` blocks: also one that is not closed, and one that was opened inside the prompt,
    so that only its end is here."""
    kept: list[str] = []
    thinks = False
    for part in THINKING.split(text):
        if part == "</think>" and not thinks:
            kept.clear()
        elif part in ("<think>", "</think>"):
            thinks = part == "<think>"
        elif not thinks:
            kept.append(part)
    return "".join(kept).strip()


def verdict(rollout: Rollout, text: str) -> str:
    """What is wrong with a rollout that is not correct, in one sentence that does not tell the right answer."""
    answer = extract_answer(text)
    if rollout.finish_reason == "length":
        return "The attempt was cut off before it was finished."
    if answer is None:
        return "The attempt gave no final answer."
    if len(answer) > MAX_QUOTED_CHARS:
        return "The attempt's final answer is not correct."
    return f"The attempt's final answer, {answer}, is not correct."
