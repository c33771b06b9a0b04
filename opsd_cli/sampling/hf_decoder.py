"""A causal language model of transformers as a decoder: its own forward and its own cache. Right for nearly every
architecture (`decoder_trial` says for which); `llama_decoder` is faster for those it knows."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from opsd_cli.engine.loading import causal_of
from opsd_cli.sampling.batch_decoder import BatchLimits


class HFDecoder:
    """Prompts enter together, padded on the left, once all rows before them are finished."""

    # What can be exchanged in a cache differs between architectures (windows, recurrent states), but every one can drop
    # and repeat rows.
    can_refill = False

    def __init__(self, lm: nn.Module, *, pad_id: int) -> None:
        self.lm, self.pad_id = lm, pad_id
        # State-space models call their cache by another name, and ignore one that is given by the usual name.
        takes = signature(causal_of(lm).forward).parameters
        self.cache_name = "past_key_values" if "past_key_values" in takes else "cache_params"
        self.device = causal_of(lm).get_input_embeddings().weight.device  # which is whole where layers are gathered

    def rows_within(self, limits: BatchLimits, longest_prompt: int, limit: int, draws: int) -> int:
        return max(1, min(limits.max_rows, limits.cache_tokens // (longest_prompt + limit), draws))

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Each distinct prompt is prefilled once; its rows of the cache are then repeated."""
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        width = max(len(prompt) for prompt in distinct)
        ids_nS = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in distinct], device=self.device)
        mask_nS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=self.device)
        self.cache = DynamicCache(config=self.lm.config)
        self.position_b1 = mask_nS.sum(dim=1, keepdim=True) - 1
        self.mask_bS = mask_nS
        # Positions count tokens, not columns: padding on the left must not shift a rotation.
        logits_nV = self._forward(ids_nS, (mask_nS.cumsum(dim=1) - 1).clamp(min=0))
        if len(distinct) == len(prompts):
            return logits_nV
        index = {prompt: i for i, prompt in enumerate(distinct)}
        index_b = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=self.device)
        self._select(index_b)
        return logits_nV[index_b]

    def step(self, token_b: Tensor) -> Tensor:
        self.position_b1 = self.position_b1 + 1
        self.mask_bS = torch.cat([self.mask_bS, self.mask_bS.new_ones(len(token_b), 1)], dim=1)
        return self._forward(token_b.unsqueeze(1), self.position_b1)

    def release(self, slot: int) -> None:
        """A finished row runs on until it is taken out."""

    def keep(self, slots: Sequence[int]) -> None:
        self._select(torch.tensor(slots, device=self.device))

    def _select(self, row_b: Tensor) -> None:
        # Not `batch_select_indices`, which recurrent states do not have: reordering picks rows too, any number of them.
        self.cache.reorder_cache(row_b)
        self.mask_bS, self.position_b1 = self.mask_bS[row_b], self.position_b1[row_b]

    def _forward(self, ids_bS: Tensor, position_bS: Tensor) -> Tensor:
        return self.lm(
            input_ids=ids_bS,
            attention_mask=self.mask_bS,
            position_ids=position_bS,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        ).logits[:, -1]
