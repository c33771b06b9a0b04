"""How far two ways of computing the same numbers are apart: one measure behind every comparison at load, so that all of
them are judged alike.

A maximum over values says little: hidden states have a few dimensions with values in the hundreds, and in bfloat16 any
difference that is small beside those would pass. So each position is judged by itself, and by spread: that of the
difference, divided by that of what sets the position apart from the others. How much rounding contributes depends on
depth and weights, so it is measured on the model itself where possible: one way of computing, in two batch shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from opsd_cli.engine.loading import causal_of

PROBE_LENGTHS = (33, 26, 18, 5)
"""Tokens of the rows that are run both ways: enough for positions and masks to matter, and two of similar length."""

NOISE_FACTOR = 6.0  # how much further another way may deviate than one way deviates from itself

# Measured on a CPU with random weights: qwen3, llama, qwen2, mistral, gpt2, qwen3_moe, cohere, granite and gemma of 24
# to 28 layers, hidden size 1024, with and without sharp attention and outlier dimensions. The largest deviation of two
# correct ways, in float32 and in bfloat16, and the noise of that model (padded rows against single rows):
#   packed rows, at the worst position           6.7e-6  4.8e-2     noise  6.5e-6  1.4e-1
#   the fast decoder, at the median position     7.9e-6  9.3e-2     noise  2.4e-6  3.9e-2
#   the policy, at the median position           1.3e-6  3.4e-2     noise  1.3e-6  3.4e-2
#   one layer of the fast decoder, overall       1.7e-6  2.0e-2     (SmolLM2-135M, trained: 5.2e-2 in its last layer)
# Smallest deviation with a fault (tests/deep_models.py), in both types:
#   rows that see one token of the row before    1.1; in the last layer only 0.12
#   the same, by what other rows may change      1.2; in the last layer only 0.10; without a fault 0
#   the fast decoder, all layers                 scale times 1.2 0.08; rotation of one layer 0.003: less than rounding
#   one layer of it                              scale times 1.2 0.055; rotation 0.24; weights times 1.2 0.14
MODEL_LIMITS = {
    torch.float32: (1e-3, 3e-2),
    torch.float64: (1e-3, 3e-2),
    torch.bfloat16: (5e-2, 0.4),
    torch.float16: (5e-2, 0.4),  # not measured: rounds eight times less than bfloat16
}
"""How far the model as a whole may deviate: where its own noise is small, and at most."""
ISOLATION_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
LAYER_LIMITS = {torch.float32: 5e-3, torch.float64: 5e-3, torch.bfloat16: 4e-2, torch.float16: 4e-2}
WORST_LAYER_FACTOR = 2.5  # over the limit of the median layer: trained models have layers that round worse than others


def deviation(values_LX: Tensor, reference_LX: Tensor) -> Tensor:
    """For each position [L] the spread of values - reference over X, divided by the spread of what sets this position
    apart: reference minus its mean over positions. Spread is the standard deviation, which ignores what is added to
    all logits of a position, as the softmax does. NaN where `values` has NaN."""
    reference_LX = reference_LX.float()
    distinct_LX = reference_LX - reference_LX.mean(dim=0)
    return (values_LX.float() - reference_LX).std(dim=1) / distinct_LX.std(dim=1)


def overall(deviation_L: Tensor) -> Tensor:
    """The root mean square over positions."""
    return deviation_L.square().mean().sqrt()


def model_limit(noise: Tensor, dtype: torch.dtype) -> float:
    """How far two ways of running the whole model may deviate, at the worst position or at the median one: `noise` is
    how far one way deviates from itself there when the batch has another shape."""
    smallest, largest = MODEL_LIMITS[dtype]
    return min(largest, max(smallest, NOISE_FACTOR * float(noise)))


def isolation_limit(noise: Tensor, dtype: torch.dtype) -> float:
    """How far a row's logits may change with rows that it does not see, at the worst position: not at all, except by
    the kernels of a mixture of experts, whose shapes depend on all tokens; `noise` is the change measured where rows
    are certainly apart."""
    return max(ISOLATION_LIMITS[dtype], NOISE_FACTOR * float(noise))


def describe(deviation: Tensor, limit: float) -> str:
    """A deviation beside its limit."""
    return f"by {percent(float(deviation))} of the spread of values (rounding explains {percent(limit)})"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def probe_rows(causal: nn.Module) -> list[Tensor]:
    """Token ids [S] of a few rows, spread over the vocabulary, on the device of the weights."""
    weight = causal.get_input_embeddings().weight
    # A prime stride: no token occurs twice, and neighbours are far apart in the vocabulary.
    ids_L = (7919 * torch.arange(1, 1 + sum(PROBE_LENGTHS), device=weight.device) + 3) % len(weight)
    return list(ids_L.split(PROBE_LENGTHS))


def model_logits(lm: nn.Module, rows: Sequence[Tensor], *, last: int = 0, padded: bool = False) -> Tensor:
    """The model's own logits [N, V] at the `last` positions of each row (0: at all of them), from one forward pass per
    row, or where `padded` from one pass over a rectangle: between these two only rounding differs."""
    if padded:
        logits_BSV = lm(input_ids=pad_sequence(list(rows), batch_first=True), use_cache=False).logits
        # Padding stands on the right, so the last positions of a row end at its own length.
        return torch.cat([logits_SV[: len(row)][-last:] for logits_SV, row in zip(logits_BSV, rows, strict=True)])
    # Where this argument is taken, the head skips the positions nobody reads.
    takes = signature(causal_of(lm).forward).parameters
    keep = {"logits_to_keep": last} if last and "logits_to_keep" in takes else {}
    return torch.cat([lm(input_ids=row[None], use_cache=False, **keep).logits[0, -last:] for row in rows])
