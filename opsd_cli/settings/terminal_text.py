"""Foreign text made harmless to look at: what a model, a dataset, a recipe or an error says may hold codes that a
terminal obeys. Owns which characters those are and how they are shown. Imports nothing.
"""

from __future__ import annotations

import re

# C0 and C1 controls but newline and tab, half surrogate pairs, and the characters that reorder text around them.
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def inert(text: object) -> str:
    """Foreign text with every control character as its visible escape; newlines and tabs stay."""
    return _ACTIVE.sub(lambda found: repr(found[0])[1:-1], str(text))


def one_line(text: object) -> str:
    """`inert` text whose newlines are visible escapes as well."""
    return inert(text).replace("\n", "\\n")
