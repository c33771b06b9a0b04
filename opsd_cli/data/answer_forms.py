"""In which form an answer is written: a number, a letter to choose, yes or no, a time, a date, words or mathematics;
and when two answers of one form agree. What has two meanings agrees with neither.
"""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache
from typing import Literal

from opsd_cli.data.plain_text import plain_text
from opsd_cli.data.quantities import UNSURE, compare_quantities, read_quantity, without_remark

Form = Literal["number", "letter", "option", "truth", "time", "date", "words", "mathematics"]

LETTER = re.compile(
    r"^(?:option |choice |answer )?(?:\(\s*(?P<in>[A-Ja-j])\s*\)|(?P<bare>[A-J])(?=$|[).:,;]|\s*[-\u2013=]\s"
    r"|\s+(?:because|since|as)\b))"
    r"(?P<rest>.*)$",
    re.IGNORECASE | re.DOTALL,
)
OTHER_LETTER = re.compile(
    rf"^[\s).,:;]*(?:or|and|/|&|,)\s*(?:{UNSURE}\s+)?(?:option |choice )?\(?[A-Ja-j]\)?(?![\w'])", re.IGNORECASE
)
OPTION = re.compile(r"^\(?[A-Ja-j](?:\)|[.:](?=\s))[.:]?\s*(?P<rest>\S.*)$", re.DOTALL)
TRUE_WORDS, FALSE_WORDS = frozenset(["yes", "true", "y"]), frozenset(["no", "false", "n"])
TRUTH = re.compile(r"^(?P<word>yes|no|true|false)\b(?P<rest>.*)$", re.IGNORECASE | re.DOTALL)
TRUTH_REST = re.compile(r"^\s*(?:$|[,.;:!(\u2013-]|because|since|as|it|they|he|she|there|this|that)", re.IGNORECASE)
HEDGE = re.compile(r"\W*(?:(?:or|and)\b|(?P<word>yes|no|true|false)\b)", re.IGNORECASE)
CLOCK = re.compile(
    r"^(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?)?\s*(?P<half>[ap]\.?\s?m\.?)?"
    r"(?:\s*o'?clock|\s*hours|\s*h)?$",
    re.IGNORECASE,
)
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
MONTH = rf"(?:{'|'.join(MONTHS)})[a-z]*\.?"
DATE = re.compile(
    rf"(?:\b(?P<iso>\d{{4}}-\d{{1,2}}-\d{{1,2}})\b|\b(?P<month>{MONTH})\s+(?P<day>\d{{1,2}})(?![\d:])(?:st|nd|rd|th)?(?:,?\s+(?P<year>\d{{4}}))?"
    rf"|(?<![\d,.])(?P<day2>\d{{1,2}})(?:st|nd|rd|th)?\.?\s+(?:of\s+)?(?P<month2>{MONTH})(?:,?\s+(?P<year2>\d{{4}}))?)",
    re.IGNORECASE,
)
WEEKDAY = re.compile(r"^(?:on\s+)?(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+", re.IGNORECASE)
WORDS = re.compile(r"\(?[^\W\d_]+(?:[ .,'-]+[^\W\d_]+)*\)?\.?")
# Words that are mathematics themselves.
MATH_WORDS = frozenset(["pi", "inf", "infinity", "sin", "cos", "tan", "log", "ln", "exp", "sqrt"])
AT_THE_END = re.compile(r"(?:[.,; ]|(?<![\d)])!)+$")  # 7! is 5040
UNSURE_BEFORE = re.compile(rf"^(?:(?:{UNSURE})[,:]?\s+)+(?=\S)", re.IGNORECASE)
UNSURE_BEHIND = re.compile(rf"(?<=\S)[,;]?\s+(?:{UNSURE}|for sure)$", re.IGNORECASE)
ARTICLE = re.compile(r"^(?:the|an|a)\s+", re.IGNORECASE)
REMARK = re.compile(
    r"^(?P<before>[^,;:]+)[,;:]\s+(?:which|who|because|since|as|so|the|where|that|for)\b", re.IGNORECASE
)


@lru_cache(maxsize=4096)
def form_of(gold: str) -> Form:
    """In which form a reference answer is written."""
    text = tidy(gold)
    if clock_of(text) is not None:
        return "time"
    if date_of(text) is not None:
        return "date"
    if read_quantity(gold) is not None:
        return "number"
    if letter_of(text) is not None:
        return "letter" if without_letter(text) == text else "option"
    if text.casefold() in TRUE_WORDS | FALSE_WORDS:
        return "truth"
    if WORDS.fullmatch(text) and (len(text) > 1 or not text.isalpha()) and MATH_WORDS.isdisjoint(text.lower().split()):
        # Never as mathematics: there `listen` and `silent` are the same product of letters.
        return "words"
    return "mathematics"


def tidy(text: str) -> str:
    """An answer without the signs around it, and without words that say how sure it is."""
    text = AT_THE_END.sub("", plain_text(text).strip(" *_\"'`"))
    return UNSURE_BEHIND.sub("", UNSURE_BEFORE.sub("", text)).strip(" *_\"'`")


def letter_of(text: str) -> str | None:
    """The letter that a whole text chooses: `C`, `(C)`, `C) Paris`, `option C`; None where it names two, or none."""
    match = LETTER.match(text)
    if match is None or OTHER_LETTER.match(match["rest"]):
        return None
    if match["bare"] and not match["bare"].isupper() and len(text) > 1 and not match["rest"].startswith(")"):
        return None
    return (match["in"] or match["bare"]).upper()


def without_letter(text: str) -> str:
    """`C) Paris` -> `Paris`; a text without a letter and its sign in front stays as it is."""
    match = OPTION.match(text)
    return match["rest"] if match else text


def truth_of(text: str) -> bool | None:
    """Whether a whole text says yes (or true), or no (or false); None where it says both, or neither."""
    match = TRUTH.match(text)
    if match is None:
        if text.casefold() in ("not", "not so", "i don't think so"):  # probably not
            return False
        return text.casefold() in TRUE_WORDS if text.casefold() in TRUE_WORDS | FALSE_WORDS else None
    says = match["word"].lower() in TRUE_WORDS
    hedge = HEDGE.match(match["rest"])
    # `Yes, true` says one thing, `yes, no` and `yes and no` do not.
    if hedge and (hedge["word"] is None or (hedge["word"].lower() in TRUE_WORDS) is not says):
        return None
    return says if TRUTH_REST.match(match["rest"]) else None


Clock = tuple[int, int, int, str]
"""Hour, minute, second, and `am` or `pm` or nothing."""


def clock_of(text: str) -> Clock | None:
    """A time of day, of which minutes or am and pm are written."""
    match = CLOCK.match(text)
    if match is None or not (match["minute"] or match["half"]):
        return None
    half = "" if match["half"] is None else match["half"][0].lower() + "m"
    hour, minute, second = int(match["hour"]), int(match["minute"] or 0), int(match["second"] or 0)
    if half and not 1 <= hour <= 12:
        return None
    return hour, minute, second, half


def same_clock(answer: Clock, gold: Clock) -> bool:
    """Whether two times agree. 5:30 agrees with 5:30 pm, which is 17:30; 5:30 does not agree with 17:30."""
    if answer[3] and gold[3]:
        return _of_day(answer) == _of_day(gold)
    if not answer[3] and not gold[3]:
        return answer[:3] == gold[:3]
    named, bare = (answer, gold) if answer[3] else (gold, answer)
    return bare[:3] == named[:3] or bare[:3] == _of_day(named)


def _of_day(clock: Clock) -> tuple[int, int, int]:
    return clock[0] % 12 + (12 if clock[3] == "pm" else 0), clock[1], clock[2]


def date_of(text: str) -> tuple[int | None, int, int] | None:
    """Year (None: not written), month and day. `3/5/2024` has two meanings and is none."""
    match = DATE.fullmatch(WEEKDAY.sub("", text).removeprefix("the "))
    if match is None:
        return None
    if match["iso"]:
        year, month, day = (int(part) for part in match["iso"].split("-"))
    else:
        name, day = match["month"] or match["month2"], int(match["day"] or match["day2"])
        written = match["year"] or match["year2"]
        month = MONTHS.index(name[:3].lower()) + 1
        year = int(written) if written else 0
    try:
        datetime(year or 2000, month, day)
    except ValueError:
        return None
    return year or None, month, day


def same_date(answer: tuple[int | None, int, int], gold: tuple[int | None, int, int]) -> bool:
    return answer[1:] == gold[1:] and (answer[0] == gold[0] or None in (answer[0], gold[0]))


def same_words(answer: str, gold: str) -> bool:
    """Whether two texts are the same words, whatever their case, article, brackets and a remark behind a comma."""
    forms = [_bare_words(answer)]
    if (match := REMARK.match(tidy(answer))) and "," not in gold:
        forms.append(_bare_words(match["before"]))
    return _bare_words(gold) in forms


def _bare_words(text: str) -> str:
    text = without_remark(tidy(text)).strip("() ")
    return " ".join(re.findall(r"[^\W_]+", ARTICLE.sub("", text).casefold()))


def grade_exactly(answer: str, gold: str) -> bool | None:
    """Whether two answers agree; None where only mathematics, or a table of units, can tell."""
    form = form_of(gold)
    if tidy(answer) == tidy(gold) != "":
        return True
    text, reference = tidy(answer), tidy(gold)
    if form in ("letter", "option"):
        return _same_letter(text, reference)
    if form == "truth":
        return truth_of(text) is truth_of(reference)
    if form == "time":
        clocks = clock_of(text), clock_of(reference)
        return clocks[0] is not None and clocks[1] is not None and same_clock(clocks[0], clocks[1])
    if form == "date":
        dates = date_of(text), date_of(reference)
        return dates[0] is not None and dates[1] is not None and same_date(dates[0], dates[1])
    if form == "words":
        return same_words(without_letter(text), reference) or same_words(text, reference)
    return _same_number(text, answer, gold)


def _same_letter(answer: str, gold: str) -> bool | None:
    """The same letter; where both also say what it stands for, or only that, the same of this."""
    chosen, meaning = letter_of(answer), without_letter(gold)
    if chosen is None:
        return meaning != gold and grade_exactly(answer, meaning)
    said = without_letter(answer)
    if chosen != letter_of(gold):
        return False
    both_say = said != answer and meaning != gold
    return not both_say or grade_exactly(said, meaning) is not False


def _same_number(text: str, answer: str, gold: str) -> bool | None:
    if clock_of(text) is not None or date_of(text) is not None:
        return False
    reference = read_quantity(gold)
    quantity = read_quantity(answer) or (read_quantity(without_letter(text)) if reference else None)
    if quantity is None or reference is None:
        return None
    verdict = compare_quantities(quantity, reference)
    return None if verdict == "ask" else verdict == "same"
