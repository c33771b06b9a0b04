"""What only a teacher is shown about a problem: its own solution and answer, or what a control puts in their
place. Owns the controls and the one cut that is ever made. The words around it are the context template's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from opsd_cli.data.answers import marked_answer
from opsd_cli.data.problems import Problem
from opsd_cli.settings.errors import DataError

CUT = ("solution", "sibling")
"""What may be cut when a prompt is too long; an answer or a sentence is never."""

CUT_MARK = "\n[...]\n"
"""Stands where the middle of a text was taken out."""

PARTS_OF_SOLUTION = ("first_step", "all_but_last")
"""Controls that show some lines of the solution, and withhold the answer."""

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
    """`keep` characters of a longer `text`, three quarters from its start and the rest from its end, with a
    mark between: the first steps and the final answer stay."""
    if len(text) <= keep:
        return text
    head = (keep * 3 + 3) // 4
    tail = keep - head
    return text[:head] + CUT_MARK + text[len(text) - tail :]


def partners(count: int, seed: int) -> list[int]:
    """A permutation in one cycle (Sattolo's algorithm): nobody is their own partner. Raises DataError when
    there is nobody else."""
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


def _own(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    return [Privileged(problem.solution, problem.answer) for problem in problems]


def _shuffled(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    return _own([problems[i] for i in partners(len(problems), seed)], seed)


def _first_step(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    return [Privileged(problem.solution.strip().split("\n")[0].strip(), "") for problem in problems]


def _all_but_last(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    return [Privileged("\n".join(_steps_and_closing(problem)[0]), "") for problem in problems]


def _wrong(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    order = partners(len(problems), seed)
    return [_wrong_one(problem, problems[i], seed) for problem, i in zip(problems, order, strict=True)]


def _wrong_one(problem: Problem, partner: Problem, seed: int) -> Privileged:
    """The solution with another final answer: a number is moved by 1 to 9, other answers become the
    partner's."""
    answer = problem.answer
    if WHOLE_NUMBER.fullmatch(answer):
        wrong = str(int(answer.replace(",", "")) + Random(f"wrong {seed} {problem.id}").randint(1, 9))
    else:
        wrong = partner.answer if partner.answer != answer else f"not {answer}"
    steps, closing = _steps_and_closing(problem)
    replaced = [_replace_answer(line, answer, wrong) for line in closing]
    if replaced == closing:
        replaced.append(f"The answer is {wrong}.")
    return Privileged("\n".join([*steps, *replaced]), wrong)


def _steps_and_closing(problem: Problem) -> tuple[list[str], list[str]]:
    """The lines of a solution before, and from, its closing: the marked line and the step before it that
    states the answer too, or without a mark the last line that does. No closing when the last line does not
    state the answer."""
    lines = [line for line in problem.solution.split("\n") if line.strip()]
    longest = 2 if marked_answer(lines[-1]) is not None else 1
    size = 0
    while size < min(longest, len(lines)) and _states(lines[-1 - size], problem.answer):
        size += 1
    return lines[: len(lines) - size], lines[len(lines) - size :]


def _states(line: str, answer: str) -> bool:
    return _replace_answer(line, answer, "") != line


def _replace_answer(line: str, answer: str, new: str) -> str:
    """`line` with every `answer` in it replaced, where it stands as a whole number or word."""
    digits = answer.replace(",", "")
    # 1080 is written 1,080 or 1080.
    pattern = r",?".join(map(re.escape, digits)) if digits.lstrip("-").isdigit() else re.escape(answer)
    return re.sub(rf"(?<![\w.,])(?:{pattern})(?![\w]|[.,]\d)", lambda _: new, line)


CONTROLS: dict[str, Callable[[Sequence[Problem], int], list[Privileged]]] = {
    "none": _own,
    "shuffled": _shuffled,
    "first_step": _first_step,
    "all_but_last": _all_but_last,
    "wrong": _wrong,
}
"""Control -> what the teacher of each problem is shown. `none` is its own solution."""
