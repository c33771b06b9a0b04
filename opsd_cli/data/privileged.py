"""What only a teacher is shown about a problem: its solution and answer, what a control puts in their place, or
something made of the step's own rollouts (SDPO, 2601.20802). The words around it are the context template's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from opsd_cli.data.answer_forms import form_of
from opsd_cli.data.answer_marks import marked_answer
from opsd_cli.data.problems import Problem, Rollout
from opsd_cli.data.stated_answers import agreeing, find_answer, last_number, stated_by
from opsd_cli.settings.errors import DataError

ROW = "row."  # before the name of a column, in a placeholder
CUT = ("solution", "sibling")  # and columns; may be cut when a prompt is too long; an answer or a sentence never is
CUT_MARK = "\n[...]\n"  # replaces the middle of a cut text
PARTS_OF_SOLUTION = ("first_step", "all_but_last")  # controls that show some lines and withhold the answer
MAX_QUOTED_CHARS = 80  # a longer answer is not quoted: it is no answer
THINKING = re.compile(r"(</?think>)")
WHOLE_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3}){1,5}|-?\d{1,18}")


Choice = Literal["correct", "any", "majority", "shortest", "longest"]
"""Which other completion of a problem is shown."""


@dataclass(frozen=True)
class Privileged:
    """What only the teacher is shown about one problem, or about one rollout of it. Empty: there is none."""

    solution: str
    answer: str
    sibling: str = ""  # a correct completion of the same problem
    feedback: str = ""  # what a verifier says of the rollout's own attempt
    columns: tuple[tuple[str, str], ...] = ()  # other columns of the problem's row
    written: str = ""  # what the policy wrote about it in the step

    @property
    def values(self) -> dict[str, str]:
        """Each text by its placeholder."""
        own = {"solution": self.solution, "answer": self.answer, "sibling": self.sibling, "feedback": self.feedback}
        return own | {"written": self.written} | {f"{ROW}{name}": text for name, text in self.columns}

    @property
    def longest(self) -> int:
        """Characters of the longest text that `cut` would cut."""
        return max(map(len, (self.solution, self.sibling, *(text for _, text in self.columns))))

    def cut(self, keep: int) -> Privileged:
        """The same with at most `keep` characters of the solution, of the sibling and of each column."""
        columns = tuple((name, cut_middle(text, keep)) for name, text in self.columns)
        solution, sibling = cut_middle(self.solution, keep), cut_middle(self.sibling, keep)
        return replace(self, solution=solution, sibling=sibling, columns=columns)


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
        return [own_of(problem) for problem in problems]
    if control == "first_step":
        return [Privileged(problem.solution.strip().split("\n")[0].strip(), "") for problem in problems]
    if control == "all_but_last":
        return [Privileged("\n".join(_steps_and_closing(problem)[0]), "") for problem in problems]
    others = [problems[i] for i in partners(len(problems), seed)]
    if control == "shuffled":
        return [own_of(other) for other in others]
    assert control == "wrong", f"unknown control {control!r}"
    return [_wrong_one(problem, other, seed) for problem, other in zip(problems, others, strict=True)]


def own_of(problem: Problem) -> Privileged:
    """What is written about a problem itself."""
    return Privileged(problem.solution, problem.answer or "", columns=problem.columns)


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
    sibling: Choice = "correct",
) -> list[Privileged]:
    """For each rollout another completion of its problem, chosen as `sibling` says, without its thinking; where there
    is none, a sentence about the rollout's own answer; nothing for the only correct one. The attempt itself is never
    shown: that costs diversity (SDPO, table 6). What is not `wanted` stays empty and has no effect."""
    nothing = [""] * len(rollouts)
    siblings = _siblings(rollouts, correct, texts, choice=sibling) if "sibling" in wanted else nothing
    shown = []
    for rollout, right, text, other in zip(rollouts, correct, texts, siblings, strict=True):
        feedback = _describe_fault(rollout, text) if "feedback" in wanted and not (other or right) else ""
        shown.append(replace(own_of(rollout.prompt.problem), sibling=other, feedback=feedback))
    return shown


def _siblings(
    rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str], *, choice: Choice
) -> list[str]:
    """For each rollout the text of its sibling, or nothing: the first that is right, the shortest or longest that is
    right (in tokens), the first that states the answer of most, or the first, right or not. One that was cut off comes
    after the others."""
    usable = [_without_thinking(text) for text in texts]
    allowed = {"any": [True] * len(rollouts), "majority": majority_of(rollouts, texts)}.get(choice, list(correct))
    length = {"shortest": 1, "longest": -1}.get(choice, 0)

    def order(index: int) -> tuple[bool, int]:
        return rollouts[index].finish_reason == "length", length * len(rollouts[index].completion_ids)

    chosen = [""] * len(rollouts)
    for family in families_of(rollouts):
        offered = sorted((index for index in family if allowed[index] and usable[index]), key=order)
        for index in family:
            chosen[index] = next((usable[other] for other in offered if other != index), "")
    return chosen


def families_of(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The rollouts of each problem, by index. A problem that a step sees twice is two problems here: both may be on one
    rank or on two, and what is shown must not depend on that."""
    families: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, rollout in enumerate(rollouts):
        families[rollout.prompt.problem.id, rollout.place].append(index)
    return list(families.values())


def majority_of(rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[bool]:
    """Whether each rollout states the answer that most rollouts of its problem state, without looking at the reference
    beyond the form of its answer. Nothing is right where no two agree; among answers stated equally often, the one that
    was stated first."""
    right = [False] * len(rollouts)
    for family in families_of(rollouts):
        said = [stated_by(texts[index], rollouts[index].prompt.problem.answer or "0") for index in family]
        largest = max(agreeing(said), key=len, default=[])
        for place in largest if len(largest) > 1 else ():
            right[family[place]] = True
    return right


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
