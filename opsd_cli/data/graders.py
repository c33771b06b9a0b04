"""Graders: which completions are right, in training and in every evaluation. Importing it does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from opsd_cli.data.answers import AnswerChecker, Grade
from opsd_cli.settings.registry import plugin


class Grades(Protocol):
    """The live grader of a run."""

    def grade(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[Grade]:
        """Of each (completion as text, accepted answers) a `Grade`: whether it is right, and whether it states an
        answer at all. Without accepted answers the problem has none."""

    def close(self) -> None:
        """End what `build` started."""


class Grader:
    """A base for graders of your own: a class with `grade` alone."""

    def build(self) -> Grades:
        return self  # type: ignore[return-value]

    def close(self) -> None:
        """There is nothing to end."""


@plugin("grader", "reference")
class ReferenceGrader:
    """The answer that a completion states is compared with the reference's (`data.answers`)."""

    def build(self) -> Grades:
        return AnswerChecker()
