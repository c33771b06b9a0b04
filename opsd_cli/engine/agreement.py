"""How far two ways of computing the same numbers are apart: the one measure behind every comparison at load, apart from
them so that all are judged alike.

The largest outlier says little: hidden states have a few dimensions of hundreds, and in bfloat16 any difference passes
that is small beside those. So each position is judged by itself, by the spread of its values: the root mean square of
the difference over that of what sets the position apart from the others. What honest rounding may do there depends on
depth and weights, so it is measured on the model itself wherever that can be done: one way, in two shapes of batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PROBE_LENGTHS = (33, 26, 18, 5)
"""Tokens of the rows that are run both ways: enough for positions and masks to matter, and two of similar length."""

NOISE_FACTOR = 6.0  # by which another way may deviate further than one way does from itself


@dataclass(frozen=True)
class Bounds:
    """What a deviation of the whole model may be where its own noise is small (`floor`), and where it is large."""

    floor: float
    ceiling: float


# FIGURES
WHOLE = {torch.float32: Bounds(1e-3, 3e-2), torch.float64: Bounds(1e-3, 3e-2), torch.bfloat16: Bounds(5e-2, 0.4)}
UNSEEN = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 1e-3}
ONE_LAYER = {torch.float32: 5e-3, torch.float64: 5e-3, torch.bfloat16: 4e-2}


def deviation(found_LX: Tensor, expected_LX: Tensor) -> Tensor:
    """For each position [L] the spread of found - expected over X, divided by the spread of what sets this position
    apart: expected minus its mean over positions. Spread is the standard deviation, which is blind to what is added to
    all logits of a position, as the softmax is. Not a number where `found` is not."""
    expected_LX = expected_LX.float()
    own_LX = expected_LX - expected_LX.mean(dim=0)
    return (found_LX.float() - expected_LX).std(dim=1) / own_LX.std(dim=1)


def overall(deviation_L: Tensor) -> Tensor:
    """The root mean square over positions."""
    return deviation_L.square().mean().sqrt()


def allowed(noise: Tensor, dtype: torch.dtype) -> float:
    """How far two ways of running the whole model may deviate, at the worst position or at the median one: `noise` is
    how far one way deviates from itself there when the batch has another shape."""
    bounds = WHOLE[dtype]
    return min(bounds.ceiling, max(bounds.floor, NOISE_FACTOR * float(noise)))


def allowed_unseen(noise: Tensor, dtype: torch.dtype) -> float:
    """How far a row's logits may change with rows that it does not see, at the worst position: not at all, except by
    the kernels of a mixture of experts, whose shapes depend on all tokens; `noise` is what they change when rows are
    apart for certain."""
    return max(UNSEEN[dtype], NOISE_FACTOR * float(noise))


def in_words(deviation: Tensor, limit: float) -> str:
    """A deviation beside what was allowed."""
    return f"by {percent(float(deviation))} of the spread of values (rounding explains {percent(limit)})"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def first_line(error: Exception) -> str:
    """What an error of a library says, for a message of one line."""
    return (str(error).strip().splitlines() or [""])[0]


def probe_rows(causal: nn.Module) -> list[Tensor]:
    """Token ids [S] of a few rows, spread over the vocabulary, on the device of the weights."""
    weight = causal.get_input_embeddings().weight
    ids_L = (7919 * torch.arange(1, 1 + sum(PROBE_LENGTHS), device=weight.device) + 3) % len(weight)
    return list(ids_L.split(PROBE_LENGTHS))
