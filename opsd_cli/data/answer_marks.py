"""The final answer that a text marks: behind `####`, or inside `\\boxed{}` or `<answer></answer>`."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_ANSWER_CHARS = 1000  # a longer answer is not read
MAX_MARKS = 50  # tried from the end of a text, which may consist of nothing but marks

STARTS_WITH_NUMBER = re.compile(r"[-\u2212+]?[$€£]?[-\u2212+]?\.?\d|\\")


def marked_answer(text: str) -> str | None:
    """What stands behind the last `####`, or inside the last `\\boxed{}` or `<answer></answer>`; the latest of them.
    `####` also begins a Markdown heading: it counts in the last line of the text, or where it begins a line and a
    number follows."""
    marks = [mark for mark in (_last_hashes(text), _last_boxed(text), _last_tagged(text)) if mark is not None]
    return max(marks)[1] if marks else None


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


def _last_tagged(text: str) -> tuple[int, str] | None:
    for start in _marks(text, "<answer>"):
        inside = start + len("<answer>")
        value, closed, _ = text[inside : inside + MAX_ANSWER_CHARS].partition("</answer>")
        if closed and value.strip():
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
