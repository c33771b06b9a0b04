"""Final answers: finds one in a text (`#### x`, `\\boxed{x}`, else the last number) and grades it.

An answer that cannot be compared counts as wrong. Checks that fail for a reason that is not the completion's stop the
run when there are too many: a broken checker would otherwise look like a model that knows nothing. Run as a program,
this file is the child process that compares two answers as mathematics.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from opsd_cli.safety.sandbox import BoundedChild, ChildError, ChildKilled, ChildStartError, serve
from opsd_cli.settings.errors import GuardError

ANSWER_UNREADABLE = "answer unreadable"  # the child's reply when one side is not mathematics
GOLD_UNREADABLE = "gold unreadable"
MAX_ANSWER_CHARS = 1000  # longer answers are not parsed
MAX_MARKS = 50  # tried from the end of a text, which may consist of nothing but marks
MIN_ERRORS = 5  # fewer never stop a run
NUMBER_TAIL_CHARS = 4000  # of the text's end, searched for a last number


@dataclass
class GradeCounts:
    """What a checker has done so far."""

    graded: int = 0
    unreadable: int = 0  # the completion's answer is not mathematics
    timeouts: int = 0  # the child had to be killed
    errors: int = 0  # the check failed, or the gold answer is not mathematics


def extract_answer(text: str) -> str | None:
    """The answer that a completion states: its last mark, or else its last number."""
    numbers = LAST_NUMBER.findall(text[-NUMBER_TAIL_CHARS:])
    return marked_answer(text) or (numbers[-1] if numbers else None)


def marked_answer(text: str) -> str | None:
    """What stands behind the last `####`, or inside the last `\\boxed{}`; the later of the two. `####` also begins a
    Markdown heading: it counts in the last line of the text, or where it begins a line and a number follows."""
    marks = [mark for mark in (_last_hashes(text), _last_boxed(text)) if mark is not None]
    return max(marks)[1] if marks else None


LAST_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?%?")
STARTS_WITH_NUMBER = re.compile(r"[-\u2212+]?[$€£]?[-\u2212+]?\.?\d|\\")


def _marks(text: str, mark: str) -> Iterator[int]:
    """The positions of `mark`, last first."""
    end = len(text)
    for _ in range(MAX_MARKS):
        end = text.rfind(mark, 0, end)
        if end < 0:
            return
        yield end


def _last_hashes(text: str) -> tuple[int, str] | None:
    stripped = text.rstrip()
    for start in _marks(stripped, "####"):
        line_start = stripped.rfind("\n", 0, start) + 1
        line_end = stripped.find("\n", start)
        value = stripped[start + 4 : line_end if line_end >= 0 else len(stripped)].strip()
        at_line_start = not stripped[line_start:start].strip()
        heading = line_end >= 0 and not (at_line_start and STARTS_WITH_NUMBER.match(value))
        if value and not heading and stripped[max(0, start - 1) : start] != "#":
            return start, value
    return None


def _last_boxed(text: str) -> tuple[int, str] | None:
    for start in _marks(text, "\\boxed"):
        inside = start + len("\\boxed")
        value = _braced(text[inside : inside + MAX_ANSWER_CHARS].lstrip())
        if value is not None and value.strip():
            return start, value.strip()
    return None


def _braced(text: str) -> str | None:
    """The inside of the brace that opens `text`, or None when it does not open or close."""
    depth = 0
    escaped = False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return text[1:position] if position else None
    return None


SPACING = re.compile(r"\\[,;:! ]|~|\\(?:left|right|displaystyle)\b")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BRACKETS = re.compile(r"[(\[]|\\\{")
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
ASSIGNED = re.compile(r"^(?:[A-Za-z]\s*)?=\s*")
NUMBER = re.compile(
    r"(?P<value>[-+]?(?:\d+(?:\.\d*)?|\.\d+))"
    r"(?P<percent>\s*(?:\\?%|percent\b))?"
    r"(?P<unit>(?:\s*\\(?:text|mathrm)\s*\{[^{}\d]*\}|\s+[^\W\d_]{2,}(?:[ -][^\W\d_]+)*)?)"
)
WORDS = re.compile(r"\(?[^\W\d_]+(?:[ '-][^\W\d_]+)*\)?")
# Words that change a number's value, or are mathematics themselves.
NOT_UNITS = frozenset(
    ["hundred", "thousand", "million", "billion", "trillion", "dozen", "score", "pi", "or", "and", "over"]
)
MATH_WORDS = frozenset(["pi", "inf", "infinity", "sin", "cos", "tan", "log", "ln", "exp", "sqrt"])


def normalise(text: str) -> str:
    """The answer without currency signs, spacing commands, thousands commas and a final full stop."""
    for sign, plain in (("\\$", ""), ("$", ""), ("\u2212", "-"), ("{,}", "")):
        text = text.replace(sign, plain)
    text = SPACING.sub(" ", text).strip().strip("*").removesuffix(".").strip()
    # In (1,200) the comma separates two numbers.
    text = text if BRACKETS.search(text) else THOUSANDS.sub("", text)
    wrapped = WRAPPED.fullmatch(text)
    text = wrapped[1].strip() if wrapped else text
    return " ".join(ASSIGNED.sub("", text).lstrip("€£ ").split())


def _number(text: str) -> tuple[Decimal, bool] | None:
    """Value, and whether it is a percentage; None for anything but one plain number, which a unit may follow."""
    match = NUMBER.fullmatch(text)
    if match is None or not NOT_UNITS.isdisjoint(match["unit"].lower().replace("-", " ").split()):
        return None
    return Decimal(match["value"]), match["percent"] is not None


def grade_exactly(answer: str, gold: str) -> bool | None:
    """Whether they agree, when both are plain numbers, the same text, or the gold answer is words; None where only
    mathematics can tell."""
    answer, gold = normalise(answer), normalise(gold)
    if answer.casefold() == gold.casefold():
        return True
    if WORDS.fullmatch(gold) and MATH_WORDS.isdisjoint(gold.lower().split()):
        # Never as mathematics: there `listen` and `silent` are the same product of letters.
        return answer.strip("() ").casefold() == gold.strip("() ").casefold()
    a, b = _number(answer), _number(gold)
    if a is None or b is None:
        return None
    percent, plain = (a, b) if a[1] else (b, a)
    return a[0] == b[0] or (percent[1] and not plain[1] and percent[0] == plain[0] * 100)  # 50% is 0.5


class AnswerChecker:
    """Grades completions. Plain numbers and words are compared here; the rest goes to math-verify in one child process
    that is started when first needed and killed when a check passes `seconds`."""

    def __init__(self, *, seconds: float = 3.0, max_error_share: float = 0.2) -> None:
        self.counts = GradeCounts()
        self.max_error_share = max_error_share
        self._child = BoundedChild("opsd_cli.data.answers", seconds=seconds)

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each (completion text, gold answer) agrees. Raises GuardError as soon as too many checks fail."""
        return [self._grade_one(completion, gold) for completion, gold in pairs]

    def _grade_one(self, completion: str, gold: str) -> bool:
        self.counts.graded += 1
        answer = extract_answer(completion)
        if answer is None:
            return False
        if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
            return self._count_failure(answer, "unreadable" if len(answer) > MAX_ANSWER_CHARS else "errors")
        same = grade_exactly(answer, gold)
        if same is not None:
            return same
        try:
            verdict = self._child.ask({"answer": normalise(answer), "gold": normalise(gold)})
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


def compare(request: dict[str, str]) -> bool | str:
    """Whether `answer` equals `gold` as mathematics, or which of them cannot be read. Raises what math-verify raises:
    its own timeouts are off, because they are signals, work in a main thread only and return False silently."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> Any:
        # One LaTeX expression, all of it: the library's other way of reading finds a first number inside what it
        # cannot parse, and would read 9**9**9 as 9.
        return parse(
            "$" + text.replace("**", "^") + "$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )

    if not (gold := read(request["gold"])):
        return GOLD_UNREADABLE
    if not (answer := read(request["answer"])):
        return ANSWER_UNREADABLE
    return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # The first parse imports the library and builds the grammar, which no answer should be charged for.
    assert compare({"gold": "1/2", "answer": "\\frac{2}{4}"}) is True
    serve(compare)
