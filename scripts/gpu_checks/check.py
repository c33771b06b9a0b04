"""What a check is, what it finds, and how that is judged. Apart from the checks, since runner, child and tests read it
without loading torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Verdict = Literal["pass", "fail", "skip", "info"]


@dataclass(frozen=True)
class Figure:
    """A number and what it may be at most (or, with `at_least`, at least). Without a limit it is information."""

    name: str
    value: float
    limit: float | None = None
    at_least: bool = False
    unit: str = ""

    @property
    def is_within(self) -> bool:
        """NaN never is."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        said = f"{self.name} {number(self.value)}{self.unit and ' ' + self.unit}"
        if self.limit is None:
            return said
        sign = (">=" if self.is_within else "<") if self.at_least else ("<=" if self.is_within else ">")
        return f"{said} {sign} {number(self.limit)}"


def number(value: float) -> str:
    """Short, with three digits that count."""
    return f"{value:,.0f}" if value == int(value or 0) and abs(value) < 1e15 else f"{value:.3g}"


@dataclass(frozen=True)
class Found:
    """What a check has measured; it passes when every figure is within its limit."""

    figures: tuple[Figure, ...]
    note: str = ""


@dataclass(frozen=True)
class Check:
    """One line of the report. `card_only` says why a CPU skips it, `lacks` what this machine has not."""

    name: str
    run: Callable[[], Found]
    card_only: str = ""
    lacks: str = ""


@dataclass(frozen=True)
class Bench:
    """Where checks run: on a card at real sizes, on a CPU at small ones."""

    device: torch.device
    scratch: Path

    @property
    def is_small(self) -> bool:
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Row:
    """The outcome of one check, as it is printed and written to JSON."""

    group: str
    name: str
    verdict: Verdict
    seconds: float
    figures: tuple[Figure, ...] = ()
    note: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.group}/{self.name}"

    def __str__(self) -> str:
        said = "; ".join(filter(None, [*map(str, self.figures), self.note]))
        return f"{self.verdict:<4}  {self.full_name:<54}  {self.seconds:6.2f} s  {said}"

    def plain(self) -> dict[str, Any]:
        figures = [asdict(figure) | {"within": figure.is_within} for figure in self.figures]
        return asdict(self) | {"figures": figures}


def judged(group: str, check: Check, found: Found, seconds: float) -> Row:
    """The row of a check that has come to its end."""
    verdict: Verdict = "info"
    if any(figure.limit is not None for figure in found.figures):
        verdict = "pass" if all(figure.is_within for figure in found.figures) else "fail"
    return Row(group, check.name, verdict, seconds, found.figures, found.note)


def row_of(plain: dict[str, Any]) -> Row:
    """The inverse of `Row.plain`."""
    keys = ("name", "value", "limit", "at_least", "unit")
    figures = tuple(Figure(**{key: figure[key] for key in keys}) for figure in plain["figures"])
    return Row(**plain | {"figures": figures})
