"""The draw of one token: from logits and a uniform number to an id and its log-probability. Owns temperature,
truncation and each completion's own stream of random numbers. Knows nothing of models, caches or batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_cli.data.problems import FinishReason
from opsd_cli.settings.config import SamplingSettings

BELOW_ONE = 1.0 - 2.0**-23  # times a positive fp32 number, it is rounded to a smaller one


@dataclass(frozen=True)
class Draw:
    """One completion to draw: after which prompt, from which stream of random numbers."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What was drawn: ids with the end-of-sequence id if there was one, and the log-probability of each under the
    distribution it was drawn from (after temperature, top-k and top-p); under the model itself where greedy."""

    ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


def draw_token(logits_BV: Tensor, sampling: SamplingSettings, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token per row, by inverting the cumulative distribution at `uniform_B`; greedy where it is None."""
    logits_BV = logits_BV.float()
    if uniform_B is None:
        token_B, probs_BV = logits_BV.argmax(dim=1), logits_BV.softmax(dim=1)
    else:
        if sampling.temperature != 1.0:
            logits_BV = logits_BV / sampling.temperature
        probs_BV = truncated(logits_BV, top_k=sampling.top_k, top_p=sampling.top_p).softmax(dim=1)
        cumulative_BV = probs_BV.cumsum(dim=1)
        # The first entry above the threshold has a probability: right=True passes over those that add nothing, and the
        # threshold stays below the sum, which rounding would otherwise lift it to.
        threshold_B1 = uniform_B.clamp(max=BELOW_ONE).unsqueeze(1) * cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
    return token_B, probs_BV.gather(1, token_B.unsqueeze(1)).squeeze(1).log()


def truncated(logits_BV: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside the k likeliest tokens, then outside the smallest set of mass `top_p`, at -inf."""
    if 0 < top_k < logits_BV.shape[1]:
        floor_B1 = logits_BV.topk(top_k, dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    if top_p < 1.0:
        sorted_BV, index_BV = logits_BV.sort(dim=1, descending=True)
        probs_BV = sorted_BV.softmax(dim=1)
        outside_BV = probs_BV.cumsum(dim=1) - probs_BV >= top_p
        logits_BV = logits_BV.masked_fill(outside_BV.scatter(1, index_BV, outside_BV), -torch.inf)
    return logits_BV


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Each draw's own stream of uniform numbers in [0, 1), [B, length], made on the CPU: equal on every device."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
