"""Which class a token belongs to: style, number, or other. Where the divergence sits by class says whether a teacher
corrects what is computed or how it is worded (arXiv:2601.18734 reports six to fifteen times as much on style)."""

from __future__ import annotations

import re
from typing import Literal

TokenClass = Literal["style", "number", "other"]

CLASSES: tuple[TokenClass, ...] = ("style", "number", "other")

_NUMBER = re.compile(
    r"\d|[=+*/\u00d7\u00f7\u00b7^<>\u2264\u2265\u2260\u221a\u00b1%\u2211\u222b\u03c0]|\\[a-zA-Z]+|^\s*[-\u2212]\s*$"
)
_WORDS = """
actually again also alright alternatively and because but carefully check clearly consider finally first given
hence hmm hold however i if indeed instead just let let's look maybe next not now oh ok okay perhaps please
really right second see similarly since so step still sure then therefore think thus understand us wait we
well yes you
"""
_STYLE = frozenset(_WORDS.split())


def token_class(piece: str) -> TokenClass:
    """The class of a token by its text alone: digits, operators and LaTeX commands are numbers; words of discourse are
    style. A rule of thumb in English, the same for every tokenizer; pieces of longer words are other."""
    if _NUMBER.search(piece):
        return "number"
    return "style" if piece.strip(" \n\t.,:;!?").lower() in _STYLE else "other"
