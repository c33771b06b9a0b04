"""The child process that compares two mathematical answers with math-verify, for `answers`.

math-verify's own timeouts are off: they are signals, work in a main thread only and return False silently.
"""

from __future__ import annotations

import logging
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from opsd_cli.data.answers import ANSWER_UNREADABLE, GOLD_UNREADABLE
from opsd_cli.safety.sandbox import serve


def compare(request: dict[str, str]) -> bool | str:
    """Whether `answer` equals `gold` as mathematics, or which of them cannot be read. An error is raised, not
    False."""
    gold = _read(request["gold"])
    if not gold:
        return GOLD_UNREADABLE
    answer = _read(request["answer"])
    if not answer:
        return ANSWER_UNREADABLE
    return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))


def _read(text: str) -> Any:
    # One LaTeX expression, all of it: the library's other way of reading finds a first number inside what it
    # cannot parse, and would read 9**9**9 as 9.
    return parse(
        "$" + text.replace("**", "^") + "$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # The first parse builds the grammar, half a second that no answer should be charged for.
    assert compare({"gold": "1/2", "answer": "\\frac{2}{4}"}) is True
    serve(compare)
