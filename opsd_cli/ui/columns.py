"""Plain tables: columns side by side, two spaces apart, as a script can cut them; on a terminal as many as fit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence

from rich.cells import cell_len

from opsd_cli.safety.terminal import escape_line

_GAP = 2


def aligned(rows: Sequence[Mapping[str, str]], *, least: Sequence[str] = (), width: int | None = None) -> list[str]:
    """A line of column names, then one for each row; nothing for no rows. With a `width` in cells the columns `least`
    are left out, the first named first, until the lines fit."""
    if not rows:
        return []
    names = list(rows[0])
    cells = {name: [escape_line(text) for text in (name, *(row[name] for row in rows))] for name in names}
    widths = {name: max(map(cell_len, cells[name])) for name in names}
    for name in least:
        if width is None or sum(widths[name] + _GAP for name in names) - _GAP <= width:
            break
        if name in names:
            names.remove(name)
    lines = zip(*(cells[name] for name in names), strict=True)
    return [
        "".join(
            text + " " * (widths[name] + _GAP - cell_len(text)) for name, text in zip(names, line, strict=True)
        ).rstrip()
        for line in lines
    ]


def terminal_width() -> int | None:
    """Cells of a line on stdout; None in a pipe, where nothing is left out."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
