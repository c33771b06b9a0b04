"""Sample rollouts for a page: each token with a shade that says how far the two roles are apart at it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opsd_cli.insight.history import History
from opsd_cli.insight.samples import SampleRollout, Token, read_samples
from opsd_cli.ui.theme import decimal, percent, plural

MOST_SAMPLES = 24  # rollouts on a page, spread over the training
LONGEST_TEXT = 20_000  # characters of a prompt or a completion
SHADES = (("0", 0.0), ("0.1", 0.12), ("0.5", 0.3), ("1", 0.45), ("2", 0.6), ("5 and more", 0.75))
"""Nats, and how opaque the colour of such a token is; between them it is interpolated."""


@dataclass(frozen=True)
class ShownSample:
    step: int
    problem: str
    verdict: str
    note: str
    prompt: str
    teacher_prompt: str
    tokens: Sequence[tuple[str, str | None, str]]  # text, shade, title
    is_open: bool  # the one that carries most: what a reader came to see


def shown_samples(run: History) -> Iterator[ShownSample]:
    """Rollouts from the whole training, their tokens shaded by divergence."""
    found = read_samples(run.folder.samples)
    stride = max(1, -(-len(found) // MOST_SAMPLES))
    shown = found[::stride]
    most = max(shown, key=_total, default=None)
    for sample in shown:
        verdict = "" if sample.reward is None else "right" if sample.reward == 1 else f"wrong (answer: {sample.answer})"
        yield ShownSample(
            step=sample.step,
            problem=sample.problem,
            verdict=verdict,
            note=_carried(sample),
            prompt=sample.prompt[:LONGEST_TEXT],
            teacher_prompt=sample.teacher_prompt[:LONGEST_TEXT],
            tokens=[_shaded(token) for token in _shortest(sample.tokens)],
            is_open=sample is most,
        )


def _total(sample: SampleRollout) -> float:
    return sum(token.divergence or 0.0 for token in sample.tokens)


def _carried(sample: SampleRollout) -> str:
    """How much of the divergence the first tokens carry: often a teacher only words the beginning otherwise."""
    losses = [token.divergence for token in sample.tokens if token.divergence is not None]
    total = sum(losses)
    if total <= 0:
        return f"{len(sample.tokens)} tokens" if losses else "no loss"
    first = max(1, len(losses) // 10)
    share = percent(sum(losses[:first]) / total)
    return f"{plural(len(losses), 'token')}, {decimal(total)} nats; the first {first} carry {share}"


def _shortest(tokens: Sequence[Token]) -> Iterator[Token]:
    room = LONGEST_TEXT
    for token in tokens:
        if room <= 0:
            yield Token(" ...", None)
            return
        yield Token(token.text[:room], token.divergence)
        room -= len(token.text)


def _shaded(token: Token) -> tuple[str, str | None, str]:
    if token.divergence is None:
        return token.text, None, ""
    opacity = shade(token.divergence)
    return token.text, f"{opacity:.2f}" if opacity >= 0.03 else None, f"{token.divergence:.4f} nats"


def shade(nats: float) -> float:
    """How opaque the colour of a token is that carries so much."""
    points = [(float(label.split()[0]), shade) for label, shade in SHADES]
    for (low, a), (high, b) in itertools.pairwise(points):
        if nats <= high:
            return a + (b - a) * max(0.0, nats - low) / (high - low)
    return points[-1][1]
