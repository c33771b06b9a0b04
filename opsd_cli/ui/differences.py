"""Two texts side by side: which words stand in both, and which in one of them only."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

Marked = list[tuple[str, bool]]
"""Pieces of a text, each with whether the other text lacks it."""


def differences(first: str, second: str) -> tuple[Marked, Marked]:
    """Both texts in pieces of whole words."""
    left, right = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second))
    marked: tuple[Marked, Marked] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for pieces, words in ((marked[0], left[a:b]), (marked[1], right[c:d])):
            if words:
                pieces.append(("".join(words), kind != "equal"))
    return marked
