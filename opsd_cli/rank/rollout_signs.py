"""What the text of rollouts says about a run's health. Owns the three cheap signs of a run that drifts: repetition,
talk of the reference, and answers without a derivation. Torch-free."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from opsd_cli.data.problems import Rollout

SPEAKS_OF_REFERENCE = re.compile(
    r"\b(reference|provided|given|sample|model) (solution|answer)s?\b"
    r"|\bas (the )?(reference|solution) (says|shows|states|suggests)\b"
    r"|\baccording to the (reference|solution)\b",
    re.IGNORECASE,
)
REPETITION_RATIO = 5.0  # bytes of text for each byte of its deflated form; prose is near 2
REPETITION_BYTES = 120  # shorter texts do not compress enough to tell
BARE_SHARE = 0.25


def count_signs(rollouts: Sequence[Rollout], texts: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """How many rollouts show each sign, by metric name."""
    rows = list(zip(rollouts, texts, correct, strict=True))
    return {
        "rollout/repeated": float(sum(repeats_itself(text) for text in texts)),
        "rollout/leaked": float(sum(bool(SPEAKS_OF_REFERENCE.search(text)) for text in texts)),
        "rollout/bare": float(sum(right and is_bare(text, row.prompt.problem.solution) for row, text, right in rows)),
    }


def repeats_itself(text: str) -> bool:
    """Whether a text is mostly copies of its own parts."""
    raw = text.encode("utf-8", "replace")
    return len(raw) >= REPETITION_BYTES and len(raw) / len(zlib.compress(raw)) > REPETITION_RATIO


def is_bare(text: str, solution: str) -> bool:
    """Whether a completion is far shorter than the reference solution."""
    return len(text) < BARE_SHARE * len(solution)
