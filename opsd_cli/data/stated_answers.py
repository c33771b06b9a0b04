"""Where a text states its answer. The form of the reference decides what is looked for: a marked answer, what the text
calls its answer, or else its last number, letter, yes or no, or words. What is ruled out or left open is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from opsd_cli.data.answer_forms import DATE, Form, clock_of, date_of, form_of, grade_exactly, letter_of, tidy, truth_of
from opsd_cli.data.answer_marks import MAX_ANSWER_CHARS, marked_answer
from opsd_cli.data.plain_text import plain_text
from opsd_cli.data.quantities import DIGITS, read_quantity

MAX_WHOLE_CHARS = 80  # of a text that is nothing but an answer
TAIL_CHARS = 4000  # of a text's end, searched for an answer without a mark
PHRASE = re.compile(
    r"(?:\b(?:answer|result|solution|option|choice|final value)\b(?:\s+(?:to|for|of)\s[^.\n]{1,80}?)?[*_]*\s*"
    r"(?:\s(?:is|was|are|will be|would be|should be|must be|=)(?=[\s:*_$\\])|[:=])[*_]*\s*(?:that\s+)?(?:[:=]\s*)?"
    r"|(?:^|\n|[.!]\s+)\s*(?:i (?:choose|pick|would choose|would pick|select)|i'd (?:choose|pick|go with))\s+)"
    r"(?P<value>[^\n]+)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?](?=\s+[^\s\d]|\s*$)")
TAKES_BACK = re.compile(
    r"\b(?:wait|actually|correction|sorry|mistake|incorrect|on second thought|let me re)", re.IGNORECASE
)
DOUBTS = re.compile(
    r"(?:(?:n't|\bnot|\bnever)\s+(?:think|believe|say|sure|certain|true|possible|likely)|\bdoubt"
    r"|\b(?:impossible|unlikely|untrue|false|wrong|incorrect)\s+(?:that|to))\b[^.!?\n]{0,80}$",
    re.IGNORECASE,
)
RULED_OUT_BEHIND = re.compile(
    r"[\s)*_]*(?:(?:is|was|are|were|would be|seems|looks|must be)\s+(?:definitely |clearly |certainly |probably )?"
    r"(?:not|never|wrong|incorrect|false|impossible|untrue|ruled out|too (?:big|small|large|low|high|many|few|much))"
    r"|(?:is|was|are|were|ca|could|wo|would|should)n'?t|(?:can|could|would|should|must) ?not)\b",
    re.IGNORECASE,
)
CONTRAST = re.compile(
    r"(?:[,;(\u2013\u2014-]\s*(?:and |but )?not|,?\s(?:rather than|instead of|as opposed to))"
    r"\s+[^\s,;]+(?: [a-z]+)?[\s.)*!]*$",
    re.IGNORECASE,
)
LISTED = re.compile(r"[(\[{][^()\[\]{}\n]*[,;]\s*$")
SEVERAL = re.compile(
    rf"(?:[a-zA-Z]\s*=\s*)?[(\[{{]?\s*[-\u2212]?{DIGITS}(?:\s*(?:,\s*(?:and\s)?|;|\band\b|&)\s*[-\u2212]?{DIGITS})+\s*[)\]}}]?"
)
CALCULATED = re.compile(r"[\^+*/\\\u221a\u03c0]|\d\s?[a-zA-Z(]|\d\s?-")
RELATION = re.compile(
    r"[<>=\u2264\u2265\u2260]|\\(?:le|ge|ne|lt|gt|leq|geq|neq)\b|\b(?:or|it|is|we|so|of|in|to|at|an|by|no|on|if|as)\b"
)
IS_RIGHT = re.compile(
    r"(?:^|[\s(*])\(?(?P<value>[A-J])\)?[*]*\s+(?:is|must be|would be)"
    r"\s+(?:the\s+)?(?:correct|right|best|true|answer)\b"
)
CHOICE = re.compile(
    r"\b(?:option|choice|i\.e\.,?)\s+\(?(?P<value>[A-J])\b\)?(?!\s+(?:or|and|is (?:not|wrong|incorrect|false))\b)"
)
SAYS_IT = re.compile(
    r"(?:\b(?:is|are|was|were|equals?|be)|[:=])\s+(?P<value>(?:[^.!?\n]|\.(?=\d))+?)[*_]*[.!]*\s*$", re.IGNORECASE
)
SENTENCE = re.compile(r"(?:^|(?<=[.!?])\s+|\n)\s*(?P<value>(?:[^.!?\n]|\.(?=\d))+[.!?]?)")
_UNIT_WORDS = (
    "mm cm dm m km mi inch inches foot feet ft yard yards yd mile miles millimeter millimeters centimeter "
    "centimeters meter meters metre metres kilometer kilometers kilometre kilometres mg g kg gram grams kilogram "
    "kilograms ton tons tonne tonnes lb lbs ounce ounces oz ml cl l liter liters litre litres gallon gallons pint "
    "pints cup cups s sec second seconds min mins minute minutes h hr hrs hour hours day days week weeks month "
    "months year years mph kph degree degrees celsius fahrenheit cent cents dollar dollars euro euros thousand "
    "million billion hundred dozen percent square cubic sq"
)
UNIT_WORDS = frozenset(_UNIT_WORDS.split())
"""A number in running text takes one of these words along; any other word behind it is the sentence's."""

UNIT_BEHIND = re.compile(
    r"\s?(?P<first>[a-zA-Z]+|[\u00b0\u00b5][a-zA-Z]+)(?P<more>\s?\^\s?\{?[23]\}?|[\u00b2\u00b3]|/[a-zA-Z]+\u00b2?|\s[a-zA-Z]+)?"
)
LAST_NUMBER = re.compile(
    r"(?<![\d.,^])(?<!\^\{)(?:(?<![\w)])[-\u2212])?[$€£]?"
    r"(?:\d{1,2}(?::[0-5]\d(?::[0-5]\d)?(?:\s?[apAP]\.?[mM]\b\.?)?|\s?[apAP]\.?[mM]\b\.?)(?!\d)"
    rf"|\d+\s\d+/\d+|{DIGITS}(?:/\d+)?(?:[eE][-+]?\d+)?(?:\s*[x\u00d7*]\s*10\s?\^\s?\{{?[-+]?\d+\}}?)?)(?:\s?%)?"
)
BEFORE_HEDGED = re.compile(
    r"(?:\b(?:(?:can)?not|never|anything but|or|than|least|most|over|under|except|between|nor|instead of"
    r"|negative|minus|plus|times|divided by|root of|half of|twice|mod|modulo|base)"
    r"|\b(?:between|both)\s+\S+\s+and|n't|[<>≤≥≠√_]|\\(?:le|ge|leq|geq|ne|neq|sqrt\s*\{?)|\d\s?-"
    r"|(?:(?<![a-zA-Z])[a-zA-Z]|[\d)}\]]) ?[+/^\u00d7\u00f7]|(?<![a-zA-Z])[a-zA-Z] ?-)\s*"
    r"(?:be\s+)?[$]?$",
    re.IGNORECASE,
)
PROSE = re.compile(r"(?<![\\a-zA-Z])(?!(?:sqrt|frac|sin|cos|tan|log|exp|and|inf)\b)[a-zA-Z]{3,}")
SHORT_WORDS = 8


def stated_by(text: str, reference: str) -> str | None:
    """The answer that a completion states, looked for in the form of the reference's."""
    return find_answer(text, form_of(reference))


def agreeing(answers: Sequence[str | None]) -> list[list[int]]:
    """The places of the answers that are the same, a list for each answer, in the order in which they first come; None
    is no answer."""
    groups: list[tuple[str, list[int]]] = []
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        same = next((places for stated, places in groups if grade_exactly(answer, stated)), None)
        if same is None:
            groups.append((answer, [place]))
        else:
            same.append(place)
    return [places for _, places in groups]


def find_answer(text: str, form: Form) -> str | None:
    """The answer that a completion states, in the form of its reference: what is marked; else what it calls its answer;
    else its last number, letter, yes or no, or words."""
    if (marked := marked_answer(text)) is not None:
        return marked if len(marked) > MAX_ANSWER_CHARS else _within_mark(CONTRAST.sub("", marked), form)
    tail = CONTRAST.sub("", text[-TAIL_CHARS:])
    is_short = len(text) <= MAX_WHOLE_CHARS
    if form in ("number", "letter", "time", "date") and is_short and _reads_as(tail, form):
        return tail.strip()
    if form in ("letter", "option") and ((letter := _last(_letters(tail))) is not None or form == "letter"):
        return letter
    if form == "truth":
        return _last(_truths(tail))
    if (called := called_answer(tail)) is not None and (
        _reads_as(called, form) or (form == "number" and is_formula(called))
    ):
        return called
    if form in ("words", "option"):
        return _words(tail)
    if form == "date" and (dates := list(DATE.finditer(tail))):
        return dates[-1][0]
    if form == "mathematics" and (formula := _formula(tail)) is not None:
        return formula
    if form == "number" and is_short and is_formula(tail):
        return tail.strip()
    if form == "number" and not re.search(r"\d", tail) and (said := SAYS_IT.search(tail)):
        return said["value"] if _reads_as(said["value"], form) else None
    return last_number(plain_text(tail))


def is_formula(text: str) -> bool:
    """Whether a text is one value by the rules of mathematics (`10^3`, `5xy`, `(6, 7)`) and not a number in words."""
    text = plain_text(text).strip(" .*_")
    if SEVERAL.fullmatch(text):
        return True
    return CALCULATED.search(text) is not None and not (RELATION.search(text) or PROSE.search(text))


def _within_mark(marked: str, form: Form) -> str:
    """What a mark holds: an answer, or a sentence that states one."""
    if form in ("words", "mathematics"):
        return called_answer(marked) or marked
    if _reads_as(marked, form):
        return marked
    if form in ("letter", "option"):
        return _last(_letters(marked)) or marked
    called = called_answer(marked)
    return called if called is not None and _reads_as(called, form) else marked


def _last(found: Iterator[tuple[int, str]]) -> str | None:
    values = sorted(found)
    return values[-1][1] if values else None


def called_answer(text: str) -> str | None:
    """What the text calls its answer last (`The answer is 7.`), unless it takes that back."""
    found = [match for match in PHRASE.finditer(text) if not DOUBTS.search(text, 0, match.start())]
    if not found or TAKES_BACK.search(text, found[-1].end()):
        return None
    value = _first_sentence(found[-1]["value"])
    return None if TAKES_BACK.search(found[-1]["value"]) else value or None


def _first_sentence(text: str) -> str:
    end = SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).strip()


def _reads_as(value: str, form: Form) -> bool:
    """Whether a called answer is whole in the wanted form; a number in the middle of words is looked for elsewhere."""
    if form == "number":
        return read_quantity(value) is not None
    if form == "letter":
        return letter_of(tidy(value)) is not None
    if form == "truth":
        return truth_of(tidy(value)) is not None
    if form == "time":
        return clock_of(tidy(value)) is not None
    if form == "date":
        return date_of(tidy(value)) is not None
    return True


def _letters(text: str) -> Iterator[tuple[int, str]]:
    """Every place in which a text chooses a letter."""
    for pattern in (PHRASE, IS_RIGHT, CHOICE):
        for match in pattern.finditer(text):
            value = _first_sentence(match["value"])
            if letter_of(tidy(value)) is not None and not DOUBTS.search(text, 0, match.start()):
                yield match.start("value"), value
    lines = [line for line in text.strip().splitlines() if line.strip()]
    chosen = [(text.rfind(line), line) for line in lines if letter_of(tidy(_first_sentence(line))) is not None]
    # A list of options has a letter at the start of many lines; a choice stands alone.
    if len(chosen) == 1 and chosen[0][1] in (lines[0], lines[-1]):
        yield chosen[0][0], _first_sentence(chosen[0][1])


def _truths(text: str) -> Iterator[tuple[int, str]]:
    """Every place in which a text says yes or no."""
    for match in PHRASE.finditer(text):
        value = tidy(_first_sentence(match["value"]))
        if truth_of(value) is not None and not DOUBTS.search(text, 0, match.start()):
            yield match.start("value"), value
    sentences = list(SENTENCE.finditer(text))
    for match in sentences:
        if truth_of(tidy(match["value"])) is not None and not TAKES_BACK.search(text, match.end()):
            yield match.start("value"), match["value"]
    if sentences and (said := SAYS_IT.search(sentences[-1]["value"])) and truth_of(tidy(said["value"])) is not None:
        yield sentences[-1].start() + said.start("value"), said["value"]


def _words(text: str) -> str | None:
    """What the last sentence says something is, or the whole of a short text."""
    sentences = [match["value"] for match in SENTENCE.finditer(text) if match["value"].strip()]
    if len(sentences) == 1 and len(text.split()) <= SHORT_WORDS and not SAYS_IT.search(sentences[0]):
        return text.strip()
    if sentences and (said := SAYS_IT.search(sentences[-1])):
        return said["value"].strip()
    return sentences[-1].strip() if sentences and len(sentences[-1].split()) <= SHORT_WORDS else None


def _formula(text: str) -> str | None:
    """What the last sentence says something is, where that is no prose; or a text that is nothing but a formula."""
    sentences = [match["value"] for match in SENTENCE.finditer(text) if match["value"].strip()]
    last = sentences[-1].strip() if sentences else ""
    said = SAYS_IT.search(last)
    for formula in (last, said["value"].strip() if said else ""):
        if formula and not PROSE.search(formula):
            return formula
    return None


def last_number(text: str) -> str | None:
    """The last number of a text, with a unit behind it; None where the text rules it out or leaves it open."""
    found = list(LAST_NUMBER.finditer(text))
    if not found or text[found[-1].end() :][:1] == "^":
        return None
    start, number = found[-1].start(), found[-1][0].strip().rstrip(",")
    if any(pattern.search(text, 0, start) for pattern in (BEFORE_HEDGED, DOUBTS, LISTED)):
        return None
    if text[:start][-1:] == "-" or (text[:start][-1:] in ("(", "[", "{") and "," in number):
        return None
    behind = UNIT_BEHIND.match(text, found[-1].end())
    if behind is None or behind["first"].lower() not in UNIT_WORDS:
        # 7x is a term, not the number 7.
        return (
            None if RULED_OUT_BEHIND.match(text, found[-1].end()) or text[found[-1].end() :][:1].isalpha() else number
        )
    if RULED_OUT_BEHIND.match(text, found[-1].end() + 1 + len(behind["first"])):
        return None
    more = behind["more"] or ""
    goes_on = not more[:1].isspace() or more.strip().lower() in UNIT_WORDS or more.strip()[:1] == "^"
    return f"{number} {behind['first']}{more if goes_on else ''}"
