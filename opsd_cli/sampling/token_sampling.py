"""The draw of one token: from logits and a uniform number to an id and its log-probability, after temperature and
truncation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opsd_cli.data.problems import FinishReason
from opsd_cli.settings.config import SamplingSettings

BELOW_ONE = 1.0 - 2.0**-23  # a positive fp32 number times this is rounded to a smaller one


@dataclass(frozen=True)
class Draw:
    """One completion to draw: its prompt, and the seed of its stream of random numbers."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """Ids, with the end-of-sequence id if there was one, and the log-probability of each under the distribution it was
    drawn from (after temperature, top-k and top-p); under the model's own where greedy."""

    ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


class Draws(Protocol):
    """What draws completions from weights that it is given: vLLM, our decoder in a process of its own, or the processes
    that rank 0 has started."""

    how: str  # in words

    def wake(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Draw from `weights` from here on: every parameter by the name it has in the checkpoint, an adapter merged."""

    def sleep(self) -> None:
        """Give memory back; the next weights wake it."""

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        end_ids: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> list[Completion]:
        """One completion per draw, in order. After a request to stop they may be cut or empty."""


def draw_token(logits_BV: Tensor, sampling: SamplingSettings, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability, by inverting the cumulative distribution at `uniform_B`; greedy if it
    is None. A token of probability 0 is never drawn."""
    logits_BV = logits_BV.float()
    if uniform_B is None:
        token_B = logits_BV.argmax(dim=1)
        return token_B, logits_BV.softmax(dim=1).gather(1, token_B.unsqueeze(1)).squeeze(1).log()
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    logits_BK, id_BK = truncate_logits(logits_BV, top_k=sampling.top_k, top_p=sampling.top_p)
    return draw_among(logits_BK, id_BK, uniform_B)


def draw_among(logits_BK: Tensor, id_BK: Tensor | None, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row among candidates in the order of the vocabulary, and its log-probability; without ids they are
    the vocabulary."""
    probs_BK = logits_BK.softmax(dim=1)
    place_B1 = invert_cumulative(probs_BK, uniform_B.unsqueeze(1))
    token_B1 = place_B1 if id_BK is None else id_BK.gather(1, place_B1)
    return token_B1.squeeze(1), probs_BK.gather(1, place_B1).squeeze(1).log()


def truncate_logits(logits_BV: Tensor, *, top_k: int, top_p: float) -> tuple[Tensor, Tensor | None]:
    """The logits of the `top_k` likeliest tokens and their ids, both in the order of the vocabulary; all logits and no
    ids if `top_k` is 0. Tokens outside the smallest set of mass `top_p` are at -inf."""
    if not 0 < top_k < logits_BV.shape[1]:
        return truncate_mass(logits_BV, top_p), None
    id_BK = likeliest(logits_BV, top_k)
    return truncate_mass(logits_BV.gather(1, id_BK), top_p), id_BK


def truncate_mass(logits_BK: Tensor, top_p: float) -> Tensor:
    """The same logits with tokens outside the smallest set of mass `top_p` at -inf."""
    if top_p >= 1.0:
        return logits_BK
    # Stable: of equally likely tokens those with a lower id stay, on every device.
    sorted_BK, index_BK = logits_BK.sort(dim=1, descending=True, stable=True)
    probs_BK = sorted_BK.softmax(dim=1)
    # A token stays if the mass before it is below top_p, so the set just reaches it; the first always stays.
    count_B1 = (probs_BK.cumsum(dim=1) - probs_BK < top_p).sum(dim=1, keepdim=True).clamp(min=1)
    outside_BK = torch.arange(probs_BK.shape[1], device=probs_BK.device) >= count_B1
    return logits_BK.masked_fill(outside_BK.scatter(1, index_BK, outside_BK), -torch.inf)


def likeliest(logits_BV: Tensor, k: int) -> Tensor:
    """The ids of exactly k tokens per row, ascending [B, k]; of equally likely ones those with the lowest ids."""
    # `topk` alone would take any of equally likely tokens, which half precision makes common, and which ones may change
    # with the device and the batch. So it is given integers without ties: the bits of the logits, which as integers
    # ascend with them once those of negative numbers are flipped, times the vocabulary, minus the id.
    bits_BV = (logits_BV + 0.0).view(torch.int32)  # + 0.0 makes one zero of the two
    order_BV = (bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)).long()
    vocabulary = logits_BV.shape[1]
    order_BV.mul_(vocabulary).sub_(torch.arange(vocabulary, device=logits_BV.device))
    return order_BV.topk(k, dim=1).indices.sort(dim=1).values


def invert_cumulative(probs_BK: Tensor, uniform_BN: Tensor) -> Tensor:
    """For each uniform number the place [B, N] whose share of the row's cumulative sum it falls into: a place with a
    probability above 0, if its row has any."""
    cumulative_BK = probs_BK.cumsum(dim=1)
    # The threshold must stay below the sum, to which rounding could lift it; it is a share of the sum, because that is
    # not exactly 1.
    threshold_BN = uniform_BN.clamp(max=BELOW_ONE) * cumulative_BK[:, -1:]
    # right=True skips entries that add nothing to the sum.
    place_BN = torch.searchsorted(cumulative_BK, threshold_BN, right=True).clamp(max=probs_BK.shape[1] - 1)
    # On a CPU that is the end of it. Elsewhere asking would make the host wait, which takes longer than what follows.
    if probs_BK.device.type == "cpu" and not bool((probs_BK.gather(1, place_BN) == 0).any()):
        return place_BN
    # A GPU sums in parallel, so that the sum may rise by a last digit where nothing is added, or fall (pytorch #16075).
    # What lands there belongs to the place before it that has a probability, or to the first that has.
    possible_BK = probs_BK > 0
    first_B1 = possible_BK.int().argmax(dim=1, keepdim=True)
    place_K = torch.arange(probs_BK.shape[1], device=probs_BK.device)
    nearest_BK = torch.where(possible_BK, place_K, first_B1).cummax(dim=1).values
    return nearest_BK.gather(1, place_BN)


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Each draw's own stream of uniform numbers in [0, 1), [B, length]. From the CPU: the same on every device."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
