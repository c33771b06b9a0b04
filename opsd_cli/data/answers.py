"""Grades completions: finds the answer that one states and compares it with the reference.

An answer that cannot be compared counts as wrong. Checks that fail for a reason that is not the completion's stop the
run when there are too many: a broken checker would otherwise look like a model that knows nothing. Run as a program,
this file is the child process that compares two answers as mathematics.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from opsd_cli.data.answer_forms import form_of, grade_exactly, without_letter
from opsd_cli.data.answer_marks import MAX_ANSWER_CHARS, marked_answer
from opsd_cli.data.plain_text import TEXT_COMMAND
from opsd_cli.data.quantities import PRODUCT, read_quantity
from opsd_cli.data.stated_answers import find_answer
from opsd_cli.data.units import same_in_units
from opsd_cli.safety.sandbox import BoundedChild, ChildError, ChildKilled, ChildStartError, serve
from opsd_cli.settings.errors import GuardError

ANSWER_UNREADABLE = "answer unreadable"  # the child's reply when one side is not mathematics
GOLD_UNREADABLE = "gold unreadable"
MIN_ERRORS = 5  # fewer never stop a run


@dataclass
class GradeCounts:
    """What a checker has done so far."""

    graded: int = 0
    unreadable: int = 0  # the completion's answer is not mathematics
    timeouts: int = 0  # the child had to be killed
    errors: int = 0  # the check failed, or the gold answer is not mathematics


@dataclass(frozen=True)
class Grade:
    """What a checker says of one completion."""

    correct: bool
    stated: bool  # it states an answer, right or wrong


def grade_plainly(completion: str, accepted: Sequence[str]) -> tuple[Grade, list[tuple[str, str]]]:
    """What can be said of a completion without the child: its grade, and the pairs (answer, reference) of which only
    the child knows whether they agree; none where it is right already."""
    undecided: list[tuple[str, str]] = []
    stated = False
    for reference in accepted:
        gold = marked_answer(reference) or reference
        answer = find_answer(completion, form_of(gold[: MAX_ANSWER_CHARS + 1]))
        if answer is None:
            continue
        stated = True
        same = grade_exactly(answer, gold) if max(len(answer), len(gold)) <= MAX_ANSWER_CHARS else None
        if same:
            return Grade(correct=True, stated=True), []
        if same is None:
            undecided.append((answer, gold))
    return Grade(correct=False, stated=stated), undecided


class AnswerChecker:
    """Grades completions. Numbers, letters, yes and no, times, dates and words are compared here; the rest goes to
    math-verify in one child process that is started when first needed and killed when a check passes `seconds`."""

    def __init__(self, *, seconds: float = 3.0, max_error_share: float = 0.2) -> None:
        self.counts = GradeCounts()
        self.max_error_share = max_error_share
        self._child = BoundedChild("opsd_cli.data.answers", seconds=seconds)

    def grade(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[Grade]:
        """Of each (completion text, accepted answers) whether they agree; without accepted answers nothing is right.
        Raises GuardError as soon as too many checks fail."""
        return [self._grade_one(completion, accepted) for completion, accepted in pairs]

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Count nothing and stop nothing inside the block, in which a dataset is graded, not a model."""
        before = self.counts, self.max_error_share
        self.counts, self.max_error_share = GradeCounts(), math.inf
        try:
            yield
        finally:
            self.counts, self.max_error_share = before

    def _grade_one(self, completion: str, accepted: Sequence[str]) -> Grade:
        self.counts.graded += 1
        grade, undecided = grade_plainly(completion, accepted)
        if any(self._ask(answer, gold) for answer, gold in undecided):
            return Grade(correct=True, stated=True)
        return grade

    def _ask(self, answer: str, gold: str) -> bool:
        """Whether two answers agree as quantities with units or as mathematics."""
        if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
            return self._count_failure(answer, "unreadable" if len(answer) > MAX_ANSWER_CHARS else "errors")
        try:
            verdict = self._child.ask({"answer": answer, "gold": gold})
        except ChildStartError as error:
            raise GuardError(f"the answer checker cannot run: {error}; is math-verify installed?") from None
        except ChildKilled:
            return self._count_failure(answer, "timeouts")
        except ChildError:
            return self._count_failure(answer, "errors")
        if isinstance(verdict, str):
            return self._count_failure(answer, "unreadable" if verdict == ANSWER_UNREADABLE else "errors")
        return bool(verdict)

    def _count_failure(self, answer: str, reason: Literal["unreadable", "timeouts", "errors"]) -> bool:
        counts = self.counts
        vars(counts)[reason] += 1
        # A completion that is not mathematics is the model's fault, not the checker's: it stops nothing.
        failed = counts.timeouts + counts.errors
        if failed >= MIN_ERRORS and failed / counts.graded > self.max_error_share:
            raise GuardError(
                f"the answer checker failed on {failed} of {counts.graded} answers ({counts.timeouts} "
                f"timeouts, {counts.errors} errors or unreadable gold answers; above "
                f"{self.max_error_share:.0%}): accuracy would mean nothing; check the dataset's "
                f"answers (last graded: {answer[:60]!r})"
            )
        return False

    def close(self) -> None:
        """Kill and reap the child process, if there is one."""
        self._child.close()


# The child ----------------------------------------------------------------------------------------------------------

SPACING = re.compile(r"(?<!\\)\\[,;:! ]|~|\\(?:left|right|displaystyle)\b")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BRACKETS = re.compile(r"[(\[]|\\\{")
ASSIGNED = re.compile(r"^(?:[A-Za-z]\s*)?=\s*")
PI = re.compile(r"(?<![\\a-zA-Z])pi\b")
TWO_NUMBERS = re.compile(r"\d\s+\d|\d\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*(?:and|or|,)\s*\})[^{}]*\}\s*\d")
LETTERS = re.compile(rf"(?<=\d)(?!(?:pi|sin|cos|tan|log|exp|ln|mod)\b){PRODUCT.pattern}")
BASE = re.compile(r"\d\s*_\s*\{?\s*(\d+)")  # 101_2


def as_latex(text: str) -> str:
    """An answer as one LaTeX expression: without currency signs, spacing commands, thousands commas and a full stop."""
    for sign, plain in (("\\$", ""), ("$", ""), ("\u2212", "-"), ("{,}", ""), ("\\dfrac", "\\frac")):
        text = text.replace(sign, plain)
    text = SPACING.sub(" ", text).strip().strip("*").removesuffix(".").strip()
    # In (1,200) the comma separates two numbers.
    text = text if BRACKETS.search(text) else THOUSANDS.sub("", text)
    wrapped = TEXT_COMMAND.fullmatch(text)
    text = without_letter(wrapped[1].strip() if wrapped else text)
    # The library would leave out the letters of 5ab as a unit.
    text = LETTERS.sub(lambda match: " " + " \\cdot ".join(match[0]), PI.sub(r"\\pi", text))
    return " ".join(ASSIGNED.sub("", text).lstrip("\u20ac\u00a3 ").split()).replace("**", "^")


def compare(request: dict[str, str]) -> bool | str:
    """Whether `answer` equals `gold` as quantities or as mathematics, or which of them cannot be read. Raises what
    math-verify raises: its own timeouts are off, because they are signals, work in a main thread only and return False
    silently."""
    from math_verify import LatexExtractionConfig, parse, verify

    quantities = read_quantity(request["answer"]), read_quantity(request["gold"])
    if quantities[0] is not None and quantities[1] is not None:
        return same_in_units(quantities[0], quantities[1])

    def read(text: str) -> Any:
        # One LaTeX expression, all of it: the library's other way of reading finds a first number inside what it
        # cannot parse, and would read 9**9**9 as 9.
        return parse(
            f"${text}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )

    answer_text, gold_text = as_latex(request["answer"]), as_latex(request["gold"])
    if not (gold := read(gold_text)):
        return GOLD_UNREADABLE
    # The library leaves out the base of a number. An answer may do so too, but not name another.
    if (bases := BASE.findall(answer_text)) and bases != BASE.findall(gold_text):
        return False
    # The library multiplies numbers that stand side by side: 2 3 would be 6.
    if TWO_NUMBERS.search(answer_text) or not (answer := read(answer_text)):
        return ANSWER_UNREADABLE
    return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # The first parse imports the library and builds the grammar, which no answer should be charged for.
    assert compare({"gold": "x/2", "answer": "\\frac{2x}{4}"}) is True
    serve(compare)
