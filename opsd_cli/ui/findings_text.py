"""Findings on a terminal: a line each, those that ask for something last."""

from __future__ import annotations

import sys

from rich.text import Text

from opsd_cli.insight.findings import Finding, Findings
from opsd_cli.ui.theme import console_for, plural, print_line

STYLES = {"ok": "good", "warning": "warn", "error": "bad"}


def print_findings(findings: Findings, *, everything: bool) -> None:
    """Print every finding, or only what is not well and how much is; and what it comes to."""
    console = console_for(sys.stdout)
    width = max((len(one.area) for one in findings.found), default=0)
    for one in findings.found:
        if everything or one.level != "ok":
            print_line(console, _line(one, width), fold=True)
    well = findings.count("ok")
    counts = [plural(findings.count(level), level) for level in ("error", "warning")]
    print_line(console, Text(f"{plural(well, 'thing')} well, {', '.join(counts)}", "label"))


def _line(one: Finding, width: int) -> Text:
    message = one.message + (f"; {one.change}" if one.change else "")
    return Text.assemble((f"{one.level:<8}", STYLES[one.level]), f"{one.area:<{width}}  ", message)
