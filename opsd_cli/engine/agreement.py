"""How far two ways of computing the same numbers are apart: the one measure behind every comparison at load, apart from
them so that all are judged alike.

The largest outlier says little: hidden states have a few dimensions of hundreds, and in bfloat16 any difference passes
that is small beside those. So each position is judged by itself, and by spread: that of the difference, over that of
what sets the position apart from the others. How much honest rounding does depends on depth and weights, so it is
measured on the model itself where that can be done: one way of computing, in two shapes of batch.
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


# Measured on a CPU with random weights: qwen3, llama, qwen2, mistral, gpt2, qwen3_moe, cohere, granite and gemma of 24
# to 28 layers, hidden size 1024, with and without sharp attention and dimensions of outliers. The largest deviation of
# two right ways, in float32 and in bfloat16, and the noise of that model (padded rows from rows alone):
#   packed rows, at the worst position           6.7e-6  4.8e-2     noise  6.5e-6  1.4e-1
#   the fast decoder, at the median position     7.9e-6  9.3e-2     noise  2.4e-6  3.9e-2
#   the policy, at the median position           1.3e-6  3.4e-2     noise  1.3e-6  3.4e-2
#   one layer of the fast decoder, overall       1.7e-6  2.0e-2     (SmolLM2-135M, trained: 5.2e-2 in its last layer)
#   the last MLP on some tokens, overall         1.6e-7  3.3e-4
# Smallest deviation with a fault (tests/deep_models.py), in both types:
#   rows that see one token of the row before    1.1; in the last layer only 0.12
#   the same, by what other rows may change      1.2; in the last layer only 0.10; without a fault 0
#   the fast decoder, whole                      scale times 1.2 0.08; rotation of one layer 0.003: less than rounding
#   one layer of it                              scale times 1.2 0.055; rotation 0.24; weights times 1.2 0.14
WHOLE = {
    torch.float32: Bounds(1e-3, 3e-2),
    torch.float64: Bounds(1e-3, 3e-2),
    torch.bfloat16: Bounds(5e-2, 0.4),
    torch.float16: Bounds(5e-2, 0.4),  # not measured: rounds eight times less
}
UNSEEN = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
WORST_LAYER = 2.5  # times what the median layer may deviate: trained models have layers that round worse than others
ONE_LAYER = {torch.float32: 5e-3, torch.float64: 5e-3, torch.bfloat16: 4e-2, torch.float16: 4e-2}


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
