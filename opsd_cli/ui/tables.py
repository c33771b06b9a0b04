"""Tables of results. Pure: events in, a renderable out; numbers right, words left, no lines around them, so
that the same table is read by a person on a terminal and by a script in a pipe.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from opsd_cli.run.events import Event
from opsd_cli.settings.terminal_text import inert
from opsd_cli.ui.theme import count, duration, percent


def evaluation_table(evaluations: Sequence[Event]) -> Table:
    """One row per evaluation: which prompt, on which problems, how many right, with the 95 % interval."""
    table = Table(box=None, header_style="label", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("prompt", "split"):
        table.add_column(name, overflow="fold")
    for name in ("problems", "right", "accuracy", "95 % interval", "length", "cut", "time"):
        table.add_column(name, justify="right", overflow="fold")
    for event in evaluations:
        table.add_row(
            inert(event["role"]),
            inert(event["split"]),
            count(event["problems"]),
            count(event["correct"]),
            percent(event["accuracy"]),
            f"{100 * event['low']:.1f} to {100 * event['high']:.1f} %",
            count(event["length_mean"]),
            percent(event["truncated"]),
            duration(event["seconds"]),
        )
    return table
