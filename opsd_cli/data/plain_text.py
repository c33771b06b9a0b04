"""Text with one way to write each sign: one minus, one space, fractions as `1/2`, without the LaTeX and Markdown around
words. What people and models type differs in these long before it differs in what it says.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MINUS = dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-")
SPACES = dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " ")
QUOTES = {"\u2019": "'", "\u02bc": "'", "\u066c": "'", "\u200b": "", "\ufeff": ""}
SIMPLE = str.maketrans({**MINUS, **SPACES, **QUOTES})
SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
WIDE = re.compile("[\uff01-\uff5e]")  # full-width letters, digits and signs
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
DELIMITERS = re.compile(r"\\[()\[\]]")
TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|boxed)\s*\{([^{}]*)\}"
)
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}|(\d)\s*(\d))")
SPACING = re.compile(r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|left|right|displaystyle)\b")
BOLD = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
BEFORE_POWER = re.compile(r"\s+\^")
REPEATING = re.compile(
    r"(?<![\w.,])(?P<start>\d*\.\d*?)(?:\\(?:overline|bar|dot)\s*(?:\{\s*(?P<line>\d+)\s*\}|(?P<digit>\d))"
    r"|\((?P<round>\d+)\)|(?P<over>(?:\d\u0305)+)|(?P<seen>\d+?)(?P=seen)+(?:\.\.\.|\u2026|\\[lc]?dots\b))(?![\w(])"
)
DEGREE = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree\b)")


def plain_text(text: str) -> str:
    """The text with one sign for each minus, space and fraction, and without the LaTeX and Markdown around words."""
    text = text.translate(SIMPLE)
    text = WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = SUPERSCRIPTS.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]).translate(SIMPLE), text)
    text = VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text)
    text = DELIMITERS.sub(" ", text).replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"\\! ?", "", text)
    # An even number of `$` encloses formulas; a single one is money.
    bare = text.replace("\\$", "")
    text = text.replace("$", "") if bare.count("$") % 2 == 0 and "\\$" not in text else text.replace("\\$", "$")
    text = DEGREE.sub("\u00b0", text)
    text = REPEATING.sub(_as_fraction, text)
    text = FRACTION.sub(lambda match: f" {match[1] or match[3]}/{match[2] or match[4]}", text)
    text = TEXT_COMMAND.sub(r" \1 ", TEXT_COMMAND.sub(r" \1 ", text))
    text = BEFORE_POWER.sub("^", text)
    return " ".join(BOLD.sub(r"\2", SPACING.sub(" ", text)).replace("$$", "").split())


def _as_fraction(match: re.Match[str]) -> str:
    """`0.1\\overline{6}` -> `1/6`."""
    start, digits = match["start"], re.sub(r"\D", "", next(filter(None, match.groups()[1:])))
    whole, _, behind = start.partition(".")
    unit = Fraction(1, 10 ** len(behind))
    value = int(whole or 0) + int(behind or 0) * unit + Fraction(int(digits), 10 ** len(digits) - 1) * unit
    return str(value)
