"""What the screens are made of: facts that flow into lines of a width, texts from elsewhere, and curves of blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.text import Text

from opsd_cli.ui.theme import cut

GAP = "   "
CURVE_CELLS = 24
_BLOCKS = "▁▂▃▄▅▆▇█"


def foreign(text: object, most: int, unicode: bool) -> str:
    """The beginning of a text from elsewhere, as wide as it will be on the terminal."""
    shown = cut(text, most)
    return shown if unicode else shown.encode("ascii", "backslashreplace").decode()


def flow(facts: Iterable[Text], width: int, *, gap: str = GAP) -> list[Text]:
    """Facts side by side, on as many lines as needed; one that is wider than a line is folded."""
    lines: list[Text] = []
    for fact in facts:
        if not fact.plain:
            continue
        if lines and cell_len(lines[-1].plain) + len(gap) + cell_len(fact.plain) <= width:
            lines[-1] = Text.assemble(lines[-1], gap, fact)
        else:
            lines += folded(fact, width)
    return lines


def folded(text: Text, width: int) -> Iterable[Text]:
    """A text cut into lines of a width in cells, wherever that is."""
    start = cells = 0
    for place, letter in enumerate(text.plain):
        size = cell_len(letter)
        if cells + size > width and place > start:
            yield text[start:place]
            start, cells = place, 0
        cells += size
    yield text[start:]


def curve(values: Sequence[float], most: int = CURVE_CELLS) -> str:
    """The finite values as a line of at most so many blocks, oldest left, each the mean of its share."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    cells = min(most, len(finite))
    edges = [round(index * len(finite) / cells) for index in range(cells + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if not math.isfinite(high - low):
        return ""
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in means)
