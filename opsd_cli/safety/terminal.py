"""Text from outside (a model, a dataset, a recipe, an error) made safe to print: it may hold codes that a terminal
obeys."""

from __future__ import annotations

import re

# C0 and C1 controls except newline and tab, half surrogate pairs, and the characters that reorder text around them.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def escape_controls(text: object) -> str:
    """The text with every control character replaced by its visible escape; newlines and tabs stay."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], str(text))


def escape_line(text: object) -> str:
    """`escape_controls`, and newlines as visible escapes too."""
    return escape_controls(text).replace("\n", "\\n")


def escape_json(document: str) -> str:
    """A JSON document with every control character in it as a JSON escape: it reads the same, may be shown on a
    terminal, and each of its lines stays one line for programs that also break lines at U+2028."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", document)
