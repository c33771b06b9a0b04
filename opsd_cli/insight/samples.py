"""The sample rollouts of a run: what was completed, token by token, how much each token carried, and which class of
token it is. Where the divergence sits by class says whether a teacher corrects what is computed or how it is worded
(arXiv:2601.18734 reports six to fifteen times as much on style as on mathematics)."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TokenClass = Literal["style", "number", "other"]

CLASSES: tuple[TokenClass, ...] = ("style", "number", "other")

_CONTROL = re.compile(r"<[|/]?\w[^<>]*>")
_NUMBER = re.compile(
    r"\d|[=+*/\u00d7\u00f7\u00b7^<>\u2264\u2265\u2260\u221a\u00b1%\u2211\u222b\u03c0]|\\[a-zA-Z]+|^\s*[-\u2212]\s*$"
)
_WORDS = """
actually again also alright alternatively and because but carefully check clearly consider finally first given
hence hmm hold however i if indeed instead just let let's look maybe next not now oh ok okay perhaps please
really right second see similarly since so step still sure then therefore think thus understand us wait we
well yes you
"""
_STYLE = frozenset(_WORDS.split())


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


_TAIL_BYTES = 2**20


def newest_sample(file: Path) -> SampleRollout | None:
    """Of the newest step's samples the one whose tokens carry most; None where there is none. Reads the end of the
    file only: a line that is longer than a mebibyte is none to look at."""
    try:
        with open(file, "rb") as lines:
            size = lines.seek(0, os.SEEK_END)
            lines.seek(max(0, size - _TAIL_BYTES))
            data = lines.read(_TAIL_BYTES)
    except OSError:
        return None
    found = parse_samples(data[: data.rfind(b"\n") + 1])
    newest = [sample for sample in found if sample.step == found[-1].step]
    return max(newest, key=lambda sample: sum(token.divergence or 0.0 for token in sample.tokens), default=None)


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


def token_class(piece: str) -> TokenClass:
    """The class of a token by its text alone: digits, operators and LaTeX commands are numbers; words of discourse are
    style. A rule of thumb in English, the same for every tokenizer; pieces of longer words are other."""
    if _CONTROL.fullmatch(piece):
        return "other"
    if _NUMBER.search(piece):
        return "number"
    return "style" if piece.strip(" \n\t.,:;!?").lower() in _STYLE else "other"


Candidate = tuple[str, float]
"""A token's text and its probability."""


@dataclass(frozen=True)
class TokenView:
    """One completion token. Probabilities and entropies are at loss.temperature, entropies and divergences in nats."""

    text: str
    id: int
    kind: TokenClass
    divergence: float  # of the two whole distributions, before support and clip
    loss: float  # what the objective counts of it: after support, clip, gates, and times its weight
    weight: float  # by the token rules; 0: it carries no loss
    forward_kl: float
    reverse_kl: float
    student_probability: float  # of this token
    teacher_probability: float
    student_entropy: float
    teacher_entropy: float
    student_expects: tuple[Candidate, ...]  # the most likely tokens
    teacher_expects: tuple[Candidate, ...]


@dataclass(frozen=True)
class RolloutView:
    problem: str  # id
    student_prompt: str
    teacher_prompt: str
    completion: str
    answer: str | None
    correct: bool
    finish_reason: str
    tokens: tuple[TokenView, ...]

    @property
    def loss(self) -> float:
        """Of all its tokens."""
        return sum(token.loss for token in self.tokens)

    @property
    def share_by_class(self) -> dict[TokenClass, float]:
        """Class of token -> its share of the loss; empty where no token carries any."""
        total = self.loss
        if total <= 0:
            return {}
        return {kind: sum(token.loss for token in self.tokens if token.kind == kind) / total for kind in CLASSES}

    @property
    def first_tenth(self) -> float:
        """Share of the loss that the first tenth of the tokens carries."""
        first = self.tokens[: max(1, len(self.tokens) // 10)]
        return sum(token.loss for token in first) / self.loss if self.loss > 0 else 0.0
