"""Drawing completions from a causal language model, token ids in, token ids out. Owns the batch loop, the cache and
the draw of one token. Does not know whose weights it runs, what a problem is, or when to sample.

Prompts are padded on the left, so every row draws its next token from the last position. Rows that have ended leave
the batch. Each completion has its own stream of uniform numbers, so what is drawn depends on its seed and its prompt,
not on which other rows share its batch (up to floating point).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from opsd_cli.data.problems import FinishReason
from opsd_cli.faults import reach
from opsd_cli.settings.config import SamplingSettings

COMPACT_BELOW = 0.75  # share of live rows under which the finished ones are taken out of the cache


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


def decode(
    lm: nn.Module,
    draws: Sequence[Draw],
    *,
    sampling: SamplingSettings,
    end_ids: Sequence[int],
    pad_id: int,
    max_rows: int,
    should_stop: Callable[[], bool],
) -> list[Completion]:
    """One completion per draw, in order. Batches of at most `max_rows` rows of similar prompt length.

    `should_stop` is asked once per token; when it says yes, what is unfinished is cut there (finish_reason length),
    which a caller that asked to stop throws away.
    """
    device = next(lm.parameters()).device
    ends = torch.tensor(sorted(end_ids), device=device)
    order = sorted(range(len(draws)), key=lambda i: len(draws[i].prompt_ids))
    completions: list[Completion | None] = [None] * len(draws)
    for start in range(0, len(order), max_rows):
        rows = order[start : start + max_rows]
        batch = _Batch(lm, [draws[i] for i in rows], sampling, ends=ends, pad_id=pad_id, device=device)
        with torch.no_grad():
            batch.run(should_stop)
        for i, completion in zip(rows, batch.completions(), strict=True):
            completions[i] = completion
    return [completion for completion in completions if completion is not None]


class _Batch:
    """Rows that are decoded together. `live_b` holds the original row numbers of those still running."""

    def __init__(
        self,
        lm: nn.Module,
        draws: Sequence[Draw],
        sampling: SamplingSettings,
        *,
        ends: Tensor,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self.lm, self.sampling, self.ends, self.pad_id = lm, sampling, ends, pad_id
        limit = sampling.max_completion_tokens
        self.tokens_BL = torch.full((len(draws), limit), pad_id, device=device)
        self.logprobs_BL = torch.zeros(len(draws), limit, device=device)
        self.lengths_B = torch.full((len(draws),), limit, device=device)
        self.stopped_B = torch.zeros(len(draws), dtype=torch.bool, device=device)
        self.uniform_BL = None if sampling.temperature == 0 else uniforms(draws, limit).to(device)
        self.live_b = torch.arange(len(draws), device=device)
        width = max(len(draw.prompt_ids) for draw in draws)
        self.input_ids_bS = torch.tensor(
            [[pad_id] * (width - len(d.prompt_ids)) + list(d.prompt_ids) for d in draws], device=device
        )
        self.mask_bS = torch.tensor(
            [[0] * (width - len(d.prompt_ids)) + [1] * len(d.prompt_ids) for d in draws], device=device
        )

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Prefill, then one token for every live row at a time."""
        running_b = torch.ones_like(self.live_b, dtype=torch.bool)
        cache = DynamicCache(config=self.lm.config)
        ids_bS, positions_bS = self.input_ids_bS, (self.mask_bS.cumsum(dim=1) - 1).clamp(min=0)
        for t in range(self.sampling.max_completion_tokens):
            logits_bV = self.lm(
                input_ids=ids_bS,
                attention_mask=self.mask_bS,
                position_ids=positions_bS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            drawn_b = self._record(t, logits_bV, running_b)
            reach("decode.token")
            running_b &= ~torch.isin(drawn_b, self.ends)
            running = int(running_b.sum())
            if running == 0:
                return
            if should_stop():
                self.lengths_B[self.live_b[running_b]] = t + 1
                return
            positions_bS = positions_bS[:, -1:] + 1
            if running < COMPACT_BELOW * len(running_b):
                keep = running_b.nonzero().flatten()
                cache.batch_select_indices(keep)
                self.live_b, self.mask_bS = self.live_b[keep], self.mask_bS[keep]
                drawn_b, positions_bS, running_b = drawn_b[keep], positions_bS[keep], running_b[keep]
            ids_bS = drawn_b.unsqueeze(1)
            self.mask_bS = torch.cat([self.mask_bS, self.mask_bS.new_ones(len(self.mask_bS), 1)], dim=1)

    def _record(self, t: int, logits_bV: Tensor, running_b: Tensor) -> Tensor:
        """Draw token `t` of every live row and note it for those that are still running."""
        uniform_b = None if self.uniform_BL is None else self.uniform_BL[self.live_b, t]
        drawn_b, logprob_b = draw_token(logits_bV, self.sampling, uniform_b)
        rows = self.live_b[running_b]
        self.tokens_BL[rows, t] = drawn_b[running_b]
        self.logprobs_BL[rows, t] = logprob_b[running_b]
        ended = rows[torch.isin(drawn_b[running_b], self.ends)]
        self.lengths_B[ended] = t + 1
        self.stopped_B[ended] = True
        return drawn_b

    def completions(self) -> Iterator[Completion]:
        rows = zip(
            self.tokens_BL.tolist(), self.logprobs_BL.tolist(), self.lengths_B.tolist(), self.stopped_B.tolist(),
            strict=True,
        )  # fmt: skip
        for ids, logprobs, length, stopped in rows:
            yield Completion(tuple(ids[:length]), "stop" if stopped else "length", tuple(logprobs[:length]))


def draw_token(logits_BV: Tensor, sampling: SamplingSettings, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token per row, by inverting the cumulative distribution at `uniform_B`; greedy where it is None."""
    logits_BV = logits_BV.float()
    if uniform_B is None:
        logprobs_BV = logits_BV.log_softmax(dim=1)
        token_B = logits_BV.argmax(dim=1)
    else:
        logits_BV = truncated(logits_BV / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        logprobs_BV = logits_BV.log_softmax(dim=1)
        cumulative_BV = logprobs_BV.exp().cumsum(dim=1)
        # The first entry above the threshold has a probability: right=True passes over those that add nothing, and the
        # threshold stays below the sum even where rounding would lift it there.
        total_B1 = cumulative_BV[:, -1:]
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        threshold_B1 = torch.minimum(uniform_B.unsqueeze(1) * total_B1, below_B1)
        token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
    return token_B, logprobs_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)


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


def uniforms(draws: Sequence[Draw], length: int) -> Tensor:
    """Each draw's own stream of uniform numbers in [0, 1), [B, length], made on the CPU: equal on every device."""
    rows = []
    for draw in draws:
        generator = torch.Generator().manual_seed(draw.seed)
        rows.append(torch.rand(length, generator=generator))
    return torch.stack(rows)
