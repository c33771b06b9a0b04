"""Numbers that are written out in words, as digits: `one hundred and twenty` -> `120`, `three quarters` -> `3/4`,
`two and a half` -> `2 1/2`. Only what is one number by the rules of English is replaced: `six seven` stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
ONES = {name: value for value, name in enumerate(_ONES.split())}
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TENS = {name: 10 * i for i, name in enumerate(_TENS.split(), start=2)}
LARGE = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 10**3}
_PARTS = "third fourth fifth sixth seventh eighth ninth tenth"
PARTS = {name: value for value, name in enumerate(_PARTS.split(), start=3)}
PARTS |= {"half": 2, "halve": 2, "quarter": 4, "hundredth": 100, "thousandth": 1000}
NUMBER_WORDS = ONES.keys() | TENS.keys() | LARGE.keys() | {"hundred"}


def _any(names: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(names, key=len, reverse=True)) + ")"


JOINT = r"(?:\s+|-)"
SMALL = rf"(?:{_any(TENS)}(?:{JOINT}{_any(list(ONES)[1:10])})?|{_any(ONES)})"
HUNDREDS = rf"(?:(?:{SMALL}|a){JOINT}hundred(?:(?:\s+and)?{JOINT}{SMALL})?|{SMALL})"
LARGER = rf"(?:(?:{HUNDREDS}|a){JOINT}{_any(LARGE)})"
WHOLE = rf"(?:{LARGER}(?:,?{JOINT}{LARGER})*(?:(?:,?\s+and|,)?{JOINT}{HUNDREDS})?|{HUNDREDS})"
PART = rf"(?:(?:{HUNDREDS}|an?){JOINT})?{_any(PARTS)}s?"
SPELLED = re.compile(
    rf"(?<![\w-])(?:(?P<whole>{WHOLE})\s+and\s+(?P<rest>{PART})|(?P<part>{PART})|(?P<number>{WHOLE}))(?![\w-])"
    r"(?P<of>\s+(?:of\s+)?an?\s+(?=dozen|hundred|thousand|million|billion|trillion))?",
    re.IGNORECASE,
)
A_DOZEN = re.compile(r"(?<![\w-])an?\s+(?=dozen\b)", re.IGNORECASE)


def in_digits(text: str) -> str:
    """The text with digits in place of spelled numbers."""
    return A_DOZEN.sub("1 ", SPELLED.sub(_digits, text))


def _digits(match: re.Match[str]) -> str:
    if match["number"]:
        return f"{_whole(match['number'])}{match['of'] or ''}"
    behind = " " if match["of"] else ""  # half a dozen -> 1/2 dozen
    part = _part(match["rest"] or match["part"])
    written = f"{part.numerator}/{part.denominator}"
    return (f"{_whole(match['whole'])} {written}" if match["whole"] else written) + behind


def _whole(words: str) -> int:
    total = below = 0
    for word in re.findall(r"[a-z]+", words.lower()):
        if word == "hundred":
            below *= 100
        elif word in LARGE:
            total, below = total + below * LARGE[word], 0
        elif word != "and":
            below += 1 if word == "a" else (ONES | TENS)[word]
    return total + below


def _part(words: str) -> Fraction:
    count, _, name = re.sub(r"-", " ", words.lower()).rpartition(" ")
    parts = PARTS[name if name in PARTS else name.removesuffix("s")]
    return Fraction(1 if count.strip() in ("", "a", "an") else _whole(count), parts)
