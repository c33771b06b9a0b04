"""The sample rollouts of a run: what was completed, token by token, and how much each token carried."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_cli.insight.token_classes import CLASSES, TokenClass, token_class


@dataclass(frozen=True)
class Token:
    text: str
    divergence: float | None  # nats; None where the rollout carried no loss


@dataclass(frozen=True)
class SampleRollout:
    """One line of samples.jsonl."""

    step: int
    problem: str
    prompt: str
    teacher_prompt: str
    answer: str
    reward: float | None  # 1.0: right; None where answers are not checked
    finish_reason: str
    tokens: tuple[Token, ...]


def read_samples(file: Path) -> list[SampleRollout]:
    """The lines of samples.jsonl; damaged ones are skipped, and an absent file has none."""
    with contextlib.suppress(OSError):
        return parse_samples(file.read_bytes())
    return []


def parse_samples(lines: bytes) -> list[SampleRollout]:
    """Lines of samples.jsonl; damaged ones are skipped."""
    found = []
    for line in lines.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            found.append(_sample(json.loads(line)))
    return found


def _sample(item: dict[str, Any]) -> SampleRollout:
    losses = [float(value) for value in item["divergence"]]
    pieces = [str(piece) for piece in item.get("pieces", ())]
    if len(pieces) != len(losses):  # without loss, or by a version that wrote no pieces
        pieces, losses = [str(item["completion"])], []
    tokens = [Token(text, losses[i] if losses else None) for i, text in enumerate(pieces)]
    return SampleRollout(
        step=int(item["step"]),
        problem=str(item["problem"]),
        prompt=str(item["prompt"]),
        teacher_prompt=str(item["teacher_prompt"]),
        answer="" if item["answer"] is None else str(item["answer"]),
        reward=None if item["reward"] is None else float(item["reward"]),
        finish_reason=str(item["finish_reason"]),
        tokens=tuple(tokens),
    )


def divergence_by_class(samples: Sequence[SampleRollout]) -> dict[TokenClass, tuple[list[int], list[float]]]:
    """Class -> the steps with samples, and the mean divergence of its tokens in them, in nats."""
    found: dict[tuple[TokenClass, int], list[float]] = defaultdict(list)
    for sample in samples:
        for token in sample.tokens:
            if token.divergence is not None:
                found[token_class(token.text), sample.step].append(token.divergence)
    curves: dict[TokenClass, tuple[list[int], list[float]]] = {}
    for kind in CLASSES:
        steps = sorted(step for name, step in found if name == kind)
        if steps:
            curves[kind] = (steps, [sum(found[kind, step]) / len(found[kind, step]) for step in steps])
    return curves
