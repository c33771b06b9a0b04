"""Quantities with units that are written differently: `120 mm` is `12 cm`, `12 m^2` is not `12 m`. Units are sympy's;
this runs in the child process that compares answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from opsd_cli.data.quantities import Quantity, units_as_written

SPELLINGS = {
    **{"in": "inch", "hr": "hour", "hrs": "hour", "min": "minute", "mins": "minute", "sec": "second", "secs": "second"},
    **{"sq": "square", "lb": "pound", "lbs": "pound", "\u00b0": "degree", "deg": "degree", "gm": "gram", "gms": "gram"},
    **{
        "kgs": "kilogram",
        "kms": "kilometer",
        "cms": "centimeter",
        "yds": "yard",
        "ml": "milliliter",
        "mL": "milliliter",
    },
    **{"cl": "centiliter", "dl": "deciliter", "ug": "microgram", "\u00b5g": "microgram", "\u03bcg": "microgram"},
    **{"yr": "year", "yrs": "year", "wk": "week", "wks": "week", "gal": "gallon", "gals": "gallon", "qt": "quart"},
}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
ABBREVIATED = {"mph": "mile/hour", "kph": "kilometer/hour", "kmh": "kilometer/hour", "fps": "foot/second"}
FACTOR = re.compile(r"(?P<name>[^\W\d_]+|\u00b0)\.?\s?(?:\^|\*\*)?\s?\{?(?P<power>-?[1-4])?\}?")
_FILLERS = "of in a an the each per total left away altogether more all long wide high tall deep old"
FILLERS = frozenset(_FILLERS.split())


def same_in_units(answer: Quantity, gold: Quantity) -> bool:
    """Whether two quantities agree whose units are written differently. Units that no table knows are words, which must
    share one: 72 clips and 72 paper clips."""
    measured = _measure(answer.unit), _measure(gold.unit)
    if None not in measured:
        return bool(_in_base_units(answer, measured[0]) == _in_base_units(gold, measured[1]))
    if answer.value != gold.value:
        return False
    words, wanted = _words(answer.unit), _words(gold.unit)
    return bool(words & wanted) if measured == (None, None) else not words or not wanted


def _words(unit: str) -> set[str]:
    return {units_as_written(word) for word in re.findall(r"[^\W\d_]+", unit)} - FILLERS


def _in_base_units(quantity: Quantity, unit: Any) -> Any:
    from sympy import Rational
    from sympy.physics.units import ampere, candela, convert_to, kelvin, kilogram, meter, mole, second

    value = Rational(quantity.value.numerator, quantity.value.denominator) * unit
    return convert_to(value, [meter, kilogram, second, ampere, kelvin, mole, candela])


def _measure(text: str) -> Any | None:
    """A unit as sympy's, or None for one that it does not know."""
    text = ABBREVIATED.get(text.lower(), text)
    whole: Any = 1
    for place, part in enumerate(re.split(r"\s*/\s*|\s+per\s+", text)):
        factor = _product(part)
        if factor is None:
            return None
        whole = whole * factor if place == 0 else whole / factor
    return whole


def _product(text: str) -> Any | None:
    whole: Any = 1
    raised = 1
    last: Any = None
    for word in re.split(r"[ \u00b7*-]+(?![*-])", text.strip()):
        match = FACTOR.fullmatch(word)
        if match is None:
            return None
        name = match["name"]
        if (power := POWERS.get(name.lower())) is not None:
            if name.lower() in ("squared", "cubed"):
                if last is None:
                    return None
                whole = whole * last ** (power - 1)
            else:
                raised = power
            continue
        unit = _unit(name)
        if unit is None:
            return None
        last, raised = unit ** (int(match["power"] or 1) * raised), 1
        whole = whole * last
    return None if last is None else whole


def _unit(name: str) -> Any | None:
    known = _known_units()
    for spelling in (name, name.lower(), name.lower().replace("metre", "meter").replace("litre", "liter")):
        for form in (
            spelling,
            SPELLINGS.get(spelling, ""),
            spelling.removesuffix("s"),
            SPELLINGS.get(spelling[:-1], ""),
        ):
            if form in known:
                return known[form]
    return None


@cache
def _known_units() -> Mapping[str, Any]:
    from sympy.physics import units
    from sympy.physics.units.quantities import Quantity as Unit

    known = {name: value for name, value in vars(units).items() if isinstance(value, Unit)}
    gallon = 4 * units.quart
    return {
        **known,
        **{"gallon": gallon, "pint": gallon / 8, "cup": gallon / 16, "ounce": units.pound / 16, "oz": units.pound / 16},
        **{"week": 7 * units.day, "ton": 1000 * units.kilogram},
    }
