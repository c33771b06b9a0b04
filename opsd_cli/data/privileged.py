"""What only a teacher is shown about a problem: its solution and answer, what a control puts in their place, or
something made of the step's own rollouts (SDPO, 2601.20802). The words around it are the context template's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

from opsd_cli.data.answer_forms import form_of
from opsd_cli.data.answer_marks import marked_answer
from opsd_cli.data.problems import Problem, Rollout
from opsd_cli.data.stated_answers import find_answer, last_number
from opsd_cli.settings.errors import DataError

CUT = ("solution", "sibling")  # may be cut when a prompt is too long; an answer or a sentence never is
CUT_MARK = "\n[...]\n"  # replaces the middle of a cut text
PARTS_OF_SOLUTION = ("first_step", "all_but_last")  # controls that show some lines and withhold the answer
MAX_QUOTED_CHARS = 80  # a longer answer is not quoted: it is no answer
THINKING = re.compile(r"(</?think>)")
WHOLE_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3}){1,5}|-?\d{1,18}")


@dataclass(frozen=True)
class Privileged:
    """What only the teacher is shown about one problem, or about one rollout of it. Empty: there is none."""

    solution: str
    answer: str
    sibling: str = ""  # a correct completion of the same problem
    feedback: str = ""  # what a verifier says of the rollout's own attempt

    @property
    def longest(self) -> int:
        """Characters of the longest text that `cut` would cut."""
        return max(len(self.solution), len(self.sibling))

    def cut(self, keep: int) -> Privileged:
        """The same with at most `keep` characters of the solution and of the sibling."""
        return replace(self, solution=cut_middle(self.solution, keep), sibling=cut_middle(self.sibling, keep))


def cut_middle(text: str, keep: int) -> str:
    """`keep` characters of a longer `text`, three quarters from its start and the rest from its end, with a mark
    between: the first steps and the final answer stay."""
    head = (keep * 3 + 3) // 4
    return text if len(text) <= keep else text[:head] + CUT_MARK + text[len(text) - (keep - head) :]


def partners(count: int, seed: int) -> list[int]:
    """A permutation in one cycle (Sattolo's algorithm): no problem is its own partner. Raises DataError for a single
    problem."""
    if count < 2:
        raise DataError(
            "context.control and target.other=wrong need at least two problems: a teacher must see another "
            "problem's solution"
        )
    random = Random(f"context control {seed}")
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(random.random() * last)
        order[last], order[other] = order[other], order[last]
    return order


def shown_under(control: str, problems: Sequence[Problem], seed: int) -> list[Privileged]:
    """What the teacher of each problem is shown: its own solution, or what a control puts in its place. A function of
    the problems, their order and `seed`. Raises DataError when a control needs a second problem and there is none."""
    if control == "none":
        return [Privileged(problem.solution, problem.answer or "") for problem in problems]
    if control == "first_step":
        return [Privileged(problem.solution.strip().split("\n")[0].strip(), "") for problem in problems]
    if control == "all_but_last":
        return [Privileged("\n".join(_steps_and_closing(problem)[0]), "") for problem in problems]
    others = [problems[i] for i in partners(len(problems), seed)]
    if control == "shuffled":
        return [Privileged(other.solution, other.answer or "") for other in others]
    assert control == "wrong", f"unknown control {control!r}"
    return [_wrong_one(problem, other, seed) for problem, other in zip(problems, others, strict=True)]


def _wrong_one(problem: Problem, partner: Problem, seed: int) -> Privileged:
    """The solution with another final answer: a number moves by 1 to 9, other answers become the partner's."""
    answer = problem.answer or ""
    if WHOLE_NUMBER.fullmatch(answer):
        wrong = str(int(answer.replace(",", "")) + Random(f"wrong {seed} {problem.id}").randint(1, 9))
    else:
        wrong = partner.answer if partner.answer and partner.answer != answer else f"not {answer}"
    steps, closing = _steps_and_closing(problem)
    replaced = [_replace_answer(line, answer, wrong) for line in closing]
    if replaced == closing:
        replaced.append(f"The answer is {wrong}.")
    return Privileged("\n".join([*steps, *replaced]), wrong)


def _steps_and_closing(problem: Problem) -> tuple[list[str], list[str]]:
    """The lines of a solution before, and from, its closing: the marked line and the step before it that states the
    answer too, or without a mark the last line that does. No closing when the last line does not state the answer."""
    lines = [line for line in problem.solution.split("\n") if line.strip()]
    answer = problem.answer or ""
    longest = 2 if lines and marked_answer(lines[-1]) is not None else 1
    size = 0
    # A line states the answer when taking the answer out of it changes the line.
    while size < min(longest, len(lines)) and _replace_answer(lines[-1 - size], answer, "") != lines[-1 - size]:
        size += 1
    return lines[: len(lines) - size], lines[len(lines) - size :]


def _replace_answer(line: str, answer: str, new: str) -> str:
    """`line` with every `answer` in it replaced, where it stands as a whole number or word."""
    digits = answer.replace(",", "")
    # 1080 is written 1,080 or 1080.
    pattern = r",?".join(map(re.escape, digits)) if digits.lstrip("-").isdigit() else re.escape(answer)
    return re.sub(rf"(?<![\w.,])(?:{pattern})(?![\w]|[.,]\d)", lambda _: new, line)


def feedback_of(
    rollouts: Sequence[Rollout],
    correct: Sequence[bool],
    texts: Sequence[str],
    *,
    wanted: Collection[str] = ("sibling", "feedback"),
) -> list[Privileged]:
    """For each rollout the first other correct completion of its problem, without its thinking (a truncated one only
    if there is no other); where there is none, a sentence about the rollout's own answer; nothing for the only
    correct one. The attempt itself is never shown: that costs diversity (SDPO, table 6). What is not `wanted` stays
    empty and has no effect."""
    siblings = _siblings(rollouts, correct, texts) if "sibling" in wanted else [""] * len(rollouts)
    shown = []
    for rollout, right, text, sibling in zip(rollouts, correct, texts, siblings, strict=True):
        feedback = _describe_fault(rollout, text) if "feedback" in wanted and not (sibling or right) else ""
        problem = rollout.prompt.problem
        shown.append(Privileged(problem.solution, problem.answer or "", sibling, feedback))
    return shown


def _siblings(rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]) -> list[str]:
    """For each rollout the text of its sibling, or nothing. A problem that a step sees twice is two problems here: both
    may be on one rank or on two, and what is shown must not depend on that."""
    families: dict[tuple[str, int], list[int]] = defaultdict(list)
    family_of = [(rollout.prompt.problem.id, rollout.place) for rollout in rollouts]
    usable = [_without_thinking(text) if right else "" for text, right in zip(texts, correct, strict=True)]
    for index in sorted(range(len(rollouts)), key=lambda index: rollouts[index].finish_reason == "length"):
        if usable[index]:
            families[family_of[index]].append(index)
    return [
        next((usable[other] for other in families[family] if other != index), "")
        for index, family in enumerate(family_of)
    ]


def _without_thinking(text: str) -> str:
    """`text` without its `<think>` blocks, including one that is never closed and one that was opened in the prompt."""
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


def _describe_fault(rollout: Rollout, text: str) -> str:
    """What is wrong with an incorrect rollout, in one sentence that does not give the right answer away."""
    form = form_of(rollout.prompt.problem.answer or "")
    answer = find_answer(text, form)
    if form == "number" and answer is not None:
        answer = last_number(answer) or answer  # of a sentence that is all there is
    if rollout.finish_reason == "length":
        return "The attempt was cut off before it was finished."
    if answer is None:
        return "The attempt gave no final answer."
    if len(answer) > MAX_QUOTED_CHARS:
        return "The attempt's final answer is not correct."
    return f"The attempt's final answer, {answer}, is not correct."
