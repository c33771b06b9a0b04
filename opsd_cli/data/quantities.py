"""Plain quantities in the forms people write them in: `$9{,}500`, `1 080`, `3,5 kg`, `1 1/2`, `1.5 x 10^3`, `12 cm^2`,
`50 %`. Read into an exact value with what stands beside it, and compared. Mathematics is not read here.

A form that can mean two numbers has its English meaning: `1.080` is a little more than one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from opsd_cli.data.number_words import NUMBER_WORDS, in_digits
from opsd_cli.data.plain_text import plain_text

# One number ---------------------------------------------------------------------------------------------------------

DIGITS = (
    r"(?:\d{1,3}(?:[ '_]\d{3})+(?!\d)(?:[.,]\d+)?"  # 1 080, 1'080.5
    r"|\d{1,3}(?:\.\d{3})+(?:,\d+)(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?![\d.])"  # 1.234,5 and 1.234.567
    r"|\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,])(?:\.\d+)?"  # 1,080 and 1,23,456
    r"|\d+(?:[.,]\d+)?|\.\d+)"
)
POWER_OF_TEN = (
    r"(?:[eE](?P<e>[-+]?\d{1,3})(?![\w.])"
    r"|\s*(?:\\times|\\cdot|[x*\u00d7\u00b7])\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<ten>[-+]?\d{1,3})\s*\}?)"
)
NUMBER = re.compile(
    rf"(?P<sign>[-+])?\s*(?P<money>US\$|USD|EUR|GBP|[$\u20ac\u00a3\u00a5\u20b9])?\s*(?P<sign2>[-+])?\s*"
    rf"(?:(?P<whole>\d+)\s+(?P<top>\d+)\s*/\s*(?P<bottom>\d+)(?![\d.,/])"
    rf"|(?P<first>{DIGITS})(?:\s*/\s*(?P<second>{DIGITS})|{POWER_OF_TEN})?)"
    rf"(?P<rest>.*)",
    re.DOTALL,
)
GROUPED_BY_COMMA = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3}")
UNSURE = (
    r"(?:(?:most |very |quite )?(?:likely|probably|possibly)|maybe|perhaps|definitely|certainly|surely|clearly"
    r"|obviously|i(?:'d| would)? (?:think|believe|guess|say|suppose)(?: that)?(?: so)?(?: it(?:'s| is))?|it(?:'s| is)"
    r"|must be)"
)
"""How sure a writer is of what follows: an answer all the same."""

BEFORE = re.compile(
    rf"^(?:{UNSURE}(?=[\s:,])[,:]?"
    r"|\\?approx\b|\u2248|\\sim\b|about|around|approximately|approx\.?|roughly|exactly|only|just"
    r"|(?:a )?total of|is|are|it is|it's|[A-Za-z]\s*(?:=|\u2248|\\approx)|=|:)\s*",
    re.IGNORECASE,
)
AND_PART = re.compile(r"(?<![\d./])(\d+) and (\d+/\d+)(?![\d./])")  # 3 and 1/2
LONE_LETTER = re.compile(r"[^\W\d_](?![^\W\d_])")
SIGN_WORD = re.compile(r"(?:negative|minus)\s+", re.IGNORECASE)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SCALES |= {"k": 10**3, "lakh": 10**5, "crore": 10**7}
SCALE = re.compile(rf"^(?P<gap>\s*)(?P<scale>{'|'.join(SCALES)})(?![^\W_])", re.IGNORECASE)
PERCENT = re.compile(r"^\s*(?:%|percent(?:age points?)?\b|per ?cent\b)", re.IGNORECASE)
MONEY = {
    "$": "dollar",
    "US$": "dollar",
    "USD": "dollar",
    "EUR": "euro",
    "GBP": "pound",
    "\u20ac": "euro",
    "\u00a3": "pound",
    "\u00a5": "yen",
    "\u20b9": "rupee",
}
MONEY_WORDS = {
    **{"dollar": "dollar", "dollars": "dollar", "usd": "dollar", "us dollars": "dollar", "bucks": "dollar"},
    **{"euro": "euro", "euros": "euro", "eur": "euro", "\u20ac": "euro", "$": "dollar", "\u00a3": "pound"},
    **{"gbp": "pound", "pounds sterling": "pound", "yen": "yen", "jpy": "yen", "rupee": "rupee", "rupees": "rupee"},
    **{"cent": "cent", "cents": "cent", "\u00a2": "cent", "\u00a5": "yen", "\u20b9": "rupee", "inr": "rupee"},
}
# What follows a number and is no unit: it changes the value, or names a second one.
_NOT_UNITS = (
    "pi or and over plus minus to mod modulo base sqrt by if else squared cubed root half halves third thirds "
    "quarter quarters fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth "
    "hundredths thousandth thousandths gross more less fewer than score factorial couple x y z n tens bn mn mln mil is "
    "are not wrong incorrect below unless infinity isn aren wasn can cannot could couldn would wouldn should was were "
    "must"
)
NOT_UNITS = frozenset(_NOT_UNITS.split())
UNIT_WORD = re.compile(r"\u00b0?[^\W\d_]+\.?(?:\s?(?:\^|\*\*)?\{?-?[1-4]\}?)?")
BETWEEN_UNITS = re.compile(r"[ /\u00b7'-]+|\*(?!\*)")
_SHORT_UNITS = (
    "mm cm dm km mi in ft yd nm um mg kg gm lb lbs oz ml cl dl min sec hr hrs day ms ns us kw mw gw kwh wh hz khz mhz "
    "ghz kb mb gb tb kj mj ev kev mev cal pa kpa mpa atm bar psi mph kph kmh fps rpm db mol ph mv kv ma ohm deg rad sq "
    "cu usd eur gbp jpy inr cup pt qt gal ton st nd rd th px dpi bit oc hp"
)
PRODUCT = re.compile(rf"(?!(?:{_SHORT_UNITS.replace(' ', '|')})(?![^\W\d_]))[^\W\d_]{{2,3}}(?![^\W\d_])", re.IGNORECASE)
"""Up to three letters right behind a number that are no unit: they are multiplied (5xy)."""

ONE_LETTER_UNITS = frozenset("mgshlLVWNJKCFA")
TEMPERATURE = re.compile(r"(?:\u00b0|degrees?\b)\s*(celsius|fahrenheit|c|f)\b", re.IGNORECASE)
REMARK = re.compile(
    r"^\s*(?:[,;:.\u2026]|-{1,2}|\u2013|\u2014)?"
    r"\s+(?:because|since|as|which|so|where|that|due|after|given|the|in total)\b.*$",
    re.IGNORECASE | re.DOTALL,
)
PARENTHESIS = re.compile(r"^(?P<before>.*?)\s*\((?P<inside>[^()]*)\)\s*\.?$", re.DOTALL)
CHANGES_MEANING = re.compile(
    r"\b(?:or|and|mod|modulo|base|not|hundreds?|thousands?|millions?|billions?|dozens?|plus|minus|times|percent|in|if)\b|[=<>+*^\\]",
    re.IGNORECASE,
)
MAX_DIGITS = 1000
SHOWN_DECIMALS = 6  # a decimal of at least so many digits may stand for a fraction that has no end


@dataclass(frozen=True)
class Quantity:
    """An exact value, and what is written beside it."""

    value: Fraction
    decimals: int | None  # digits behind the point; None for a fraction
    percent: bool
    money: str  # dollar, cent, ...; empty: none is named
    unit: str  # as written; empty: none


def decimal_of(digits: str) -> tuple[Fraction, int] | None:
    """The value of digits with separators, and how many stand behind the point; None for what is no one number."""
    compact = re.sub(r"[ '_]", "", digits)
    if "," in compact and "." in compact:
        point = max(compact.rfind(","), compact.rfind("."))
        compact = re.sub("[,.]", "", compact[:point]) + "." + compact[point + 1 :]
    elif GROUPED_BY_COMMA.fullmatch(compact) or compact.count(".") > 1 or compact.count(",") > 1:
        compact = re.sub("[,.]", "", compact)
    compact = compact.replace(",", ".")
    return Fraction(compact if compact[0] != "." else "0" + compact), len(compact.partition(".")[2])


def read_quantity(text: str) -> Quantity | None:
    """The quantity that the whole text states; None for anything else, mathematics above all."""
    text = plain_text(text).strip(" *_\"'").rstrip(".,; ")
    if len(text) > MAX_DIGITS:
        return None
    text = AND_PART.sub(r"\1 \2", in_digits(text))
    while (match := BEFORE.match(text)) and match.end():
        text = text[match.end() :]
    text = without_remark(text)
    if not text or text[0] in "([{":
        return None
    if match := SIGN_WORD.match(text):
        quantity = _after_number(text[match.end() :])
        return None if quantity is None or quantity.value < 0 else replace(quantity, value=-quantity.value)
    return _after_number(text)


def without_remark(text: str) -> str:
    """`7 (see step 2)` -> `7`. What is in brackets stays where it says how the number is meant, or another one."""
    match = PARENTHESIS.fullmatch(text)
    if match and match["before"] and match["inside"][:1].isalpha() and not CHANGES_MEANING.search(match["inside"]):
        return match["before"].rstrip(" .,;")
    return text


def _after_number(text: str) -> Quantity | None:
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    read = _value_of(match)
    if read is None:
        return None
    value, decimals = read
    if match["sign"] and match["sign2"]:
        return None
    if "-" in (match["sign"], match["sign2"]):
        value = -value
    return _with_rest(value, decimals, MONEY.get(match["money"] or "", ""), match["rest"])


def _value_of(match: re.Match[str]) -> tuple[Fraction, int | None] | None:
    """The value without its sign, and the digits behind its point."""
    if match["whole"]:
        bottom = int(match["bottom"])
        return (int(match["whole"]) + Fraction(int(match["top"]), bottom), None) if bottom else None
    first = decimal_of(match["first"])
    if first is None:
        return None
    value, decimals = first
    if match["second"]:
        second = decimal_of(match["second"])
        return (value / second[0], None) if second and second[0] else None
    if exponent := match["e"] or match["ten"]:
        return value * Fraction(10) ** int(exponent), max(0, decimals - int(exponent))
    return value, decimals


def _with_rest(value: Fraction, decimals: int | None, money: str, rest: str) -> Quantity | None:
    """The quantity with what follows its number: a scale, a percent sign, a currency, a unit, a remark."""
    if match := SCALE.match(rest):
        is_letter = match["scale"].lower() == "k"
        if not is_letter or (not match["gap"] and match["scale"] == "k"):
            value, rest = value * SCALES[match["scale"].lower()], rest[match.end() :]
    percent = PERCENT.match(rest)
    rest = rest[percent.end() :] if percent else rest
    rest = "" if REMARK.match(rest) or (percent and re.match(r" of [^\d]*$", rest, re.IGNORECASE)) else rest
    unit = rest.strip().rstrip(".,;")
    if (named := MONEY_WORDS.get(unit.lower())) is not None:
        if money and named != money:
            return None
        money, unit = named, ""
    if unit and not is_unit(unit, attached=not rest[:1].isspace()):
        return None
    return Quantity(value, decimals, percent is not None, money, unit)


def is_unit(text: str, *, attached: bool) -> bool:
    """Whether words behind a number can be its unit: words, with small powers, none of which changes the value."""
    if len(text) == 1:
        return text == "\u00b0" or (text in ONE_LETTER_UNITS and not attached)
    words = [word for word in BETWEEN_UNITS.split(text) if word]
    if LONE_LETTER.match(text) and text[0] not in ONE_LETTER_UNITS:
        return False  # 5x^2
    if not NUMBER_WORDS.isdisjoint(text.lower().split()):
        return False  # one hundred five hundred
    if attached and PRODUCT.match(text):
        return False  # 5xy
    return all(UNIT_WORD.fullmatch(word) for word in words) and NOT_UNITS.isdisjoint(re.split(r"[\s']+", text.lower()))


# Comparing ----------------------------------------------------------------------------------------------------------

Verdict = Literal["same", "different", "ask"]
"""`ask`: both have a unit, and the units are written differently."""


def compare_quantities(answer: Quantity, gold: Quantity) -> Verdict:
    """Whether an answer agrees with the reference. A unit or a currency may be missing on one side; two that are given
    must agree. `50%` is 0.5, and also 50 where the reference is above 1 or says percent itself."""
    if answer.money and gold.money and answer.money != gold.money:
        cents = {"cent": Fraction(1, 100), "dollar": Fraction(1), "euro": Fraction(1)}
        if "cent" not in (answer.money, gold.money) or not {answer.money, gold.money} <= cents.keys():
            return "different"
        same = answer.value * cents[answer.money] == gold.value * cents[gold.money]
        return "same" if same else "different"
    if answer.unit and gold.unit and units_as_written(answer.unit) != units_as_written(gold.unit):
        return "ask"
    if any(one.percent and (other.unit or other.money) for one, other in ((answer, gold), (gold, answer))):
        return "different"
    if (answer.unit and gold.money) or (answer.money and gold.unit):
        is_weight_or_money = "pound" in (answer.money, gold.money) and (answer.unit or gold.unit).lower() == "pounds"
        if not is_weight_or_money:
            return "different"
    return "same" if _same_value(answer, gold) else "different"


def _same_value(answer: Quantity, gold: Quantity) -> bool:
    if answer.percent == gold.percent:
        return close(answer, gold)
    percent, plain = (answer, gold) if answer.percent else (gold, answer)
    if percent.value == plain.value * 100:
        return True
    # A probability of 0.5 is not 0.5 %; a share of 50 is 50 %.
    return percent.value == plain.value and (gold.percent or abs(plain.value) >= 1 or plain.value == 0)


def close(answer: Quantity, gold: Quantity) -> bool:
    """Equal; or a decimal with many digits beside a fraction that it rounds."""
    if answer.value == gold.value:
        return True
    for decimal, fraction in ((answer, gold), (gold, answer)):
        if decimal.decimals is not None and fraction.decimals is None and decimal.decimals >= SHOWN_DECIMALS:
            return abs(decimal.value - fraction.value) <= Fraction(1, 2 * 10**decimal.decimals)
    return False


def units_as_written(unit: str) -> str:
    """A unit without what does not change it: case of words, plural, spaces around signs."""
    unit = re.sub(r"[{}\\]", "", unit).replace("**", "^").rstrip(".")
    unit = TEMPERATURE.sub(lambda match: "\u00b0" + match[1][0], unit)
    words = re.split(r"(\W+)", unit)
    return "".join(word.lower().removesuffix("s") if len(word) > 3 else word for word in words).replace(" ", "")
