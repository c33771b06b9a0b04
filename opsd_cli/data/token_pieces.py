"""A completion as the text of each of its tokens, for people who look at single tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a character whose bytes are spread over several tokens
_WINDOW = 8  # tokens that are decoded again before the newest: enough for any character and any joining of words


def token_pieces(ids: Sequence[int], decode: Callable[[list[int]], Any]) -> list[str]:
    """The text that each token adds; together they are the decoded completion. A character that several tokens make
    stands at the last of them, and the others have an empty piece."""
    pieces: list[str] = []
    start, shown = 0, 0  # of the window; tokens whose text has been given out
    for end in range(1, len(ids) + 1):
        before = decode(list(ids[start:shown]))
        text = decode(list(ids[start:end]))
        if text.endswith(_UNFINISHED) and end < len(ids) and end - shown < _WINDOW:
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        shown = end
        start = max(start, end - _WINDOW)
    return pieces
