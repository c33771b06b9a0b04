"""The slowest decoder, and right for every model: without a cache, each token is the last one of a pass over its whole
row. For architectures whose cache does not survive a batch that changes."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn

from opsd_cli.engine.loading import causal_of
from opsd_cli.sampling.batch_decoder import BatchLimits


class WholeRowDecoder:
    """Rows of one length run together, so that nothing is ever padded."""

    can_refill = True

    def __init__(self, lm: nn.Module) -> None:
        self.lm = lm
        self.device = causal_of(lm).get_input_embeddings().weight.device  # which is whole where layers are gathered
        takes = signature(causal_of(lm).forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.rows: list[list[int]] = []
        self.live: set[int] = set()

    def rows_within(self, limits: BatchLimits, longest_prompt: int, limit: int, draws: int) -> int:
        # There is no cache, but a pass holds states of as many positions.
        return max(1, min(limits.max_rows, limits.cache_tokens // (longest_prompt + limit), draws))

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        if not self.live:
            self.rows = [[] for _ in slots]
        self.live.update(slots)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.rows[slot] = list(prompt)
        return self._logits(slots)

    def step(self, token_b: Tensor) -> Tensor:
        for slot, token in enumerate(token_b.tolist()):
            # The row of a free slot stays as it is: its logits have no meaning.
            if slot in self.live:
                self.rows[slot].append(token)
        return self._logits(range(len(self.rows)))

    def release(self, slot: int) -> None:
        self.live.discard(slot)

    def keep(self, slots: Sequence[int]) -> None:
        self.rows = [self.rows[slot] for slot in slots]
        self.live = set(range(len(slots)))

    def _logits(self, slots: Sequence[int]) -> Tensor:
        """Logits of the last position of each slot [n, V]; those of free slots are zero."""
        groups: dict[int, dict[tuple[int, ...], list[int]]] = {}  # length -> row -> its places among `slots`
        for place, slot in enumerate(slots):
            if slot in self.live:
                row = tuple(self.rows[slot])
                groups.setdefault(len(row), {}).setdefault(row, []).append(place)
        logits: dict[int, Tensor] = {}
        for rows in groups.values():
            ids_nS = torch.tensor(list(rows), device=self.device)
            last_nV = self.lm(input_ids=ids_nS, use_cache=False, **self.options).logits[:, -1]
            logits |= {place: last_V for places, last_V in zip(rows.values(), last_nV, strict=True) for place in places}
        nothing_V = torch.zeros_like(next(iter(logits.values())))
        return torch.stack([logits.get(place, nothing_V) for place in range(len(slots))])
