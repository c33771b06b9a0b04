"""Privileged context made of a step's own rollouts: a correct sibling, or what a verifier says of the attempt (SDPO,
2601.20802). Owns which is shown to whom; the text around it is the context template's. The attempt itself is never
shown: that costs diversity (SDPO, table 6)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opsd_cli.data.answers import extract_answer
from opsd_cli.data.contexts import Privileged
from opsd_cli.data.problems import Rollout

THINKING = re.compile(r"^.*</think>", re.DOTALL)  # some templates open the block inside the prompt


def feedback_of(rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]) -> list[Privileged]:
    """For each rollout the first other correct completion of its problem, without its thinking; where there is none,
    a sentence about the rollout's own answer; nothing for the only correct one."""
    right: dict[str, list[int]] = {}
    for i, (rollout, is_right) in enumerate(zip(rollouts, correct, strict=True)):
        if is_right:
            right.setdefault(rollout.prompt.problem.id, []).append(i)
    shown = []
    for i, (rollout, is_right, text) in enumerate(zip(rollouts, correct, texts, strict=True)):
        problem = rollout.prompt.problem
        sibling = next((texts[j] for j in right.get(problem.id, []) if j != i), "")
        feedback = "" if sibling or is_right else verdict(rollout, text)
        shown.append(Privileged(problem.solution, problem.answer, THINKING.sub("", sibling).strip(), feedback))
    return shown


def verdict(rollout: Rollout, text: str) -> str:
    """What is wrong with a rollout that is not correct, in one sentence."""
    answer = extract_answer(text)
    if rollout.finish_reason == "length":
        return "The attempt was cut off before it was finished."
    if answer is None:
        return "The attempt gave no final answer."
    return f"The attempt's final answer, {answer}, is not correct."
