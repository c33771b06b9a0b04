"""A model's own forward over a cache that stays where it is, for architectures that the fast pass does not know: one
token of all rows has the same shapes and addresses at every length, so that it can be captured in a graph. Prompts are
prefilled by the model's own growing cache, and copied.

Unlike transformers' `StaticCache`, in which all rows write the same column, each row here has a length of its own, so
rows may enter while others run. Only layers whose cache is keys and values of every position can be held that way;
whether the model's forward is right over it, and may be captured, is tried (`choose_decoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from opsd_cli.data.pairing import upload
from opsd_cli.engine.device import free_bytes
from opsd_cli.engine.loading import causal_of
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.graphs import Graphs, bucket_of

COLUMN_STEP = 128  # positions by which a cache grows
CACHE_SHARE = 0.9  # of a GPU's free memory, which a cache may take


class NotHeld(RuntimeError):
    """The model's cache is more than keys and values of every position."""


class RowsLayer(CacheLayerMixin):
    """Keys and values [R, K, S, E] of one layer, each row written at its own place."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys_RKSE: Tensor, values_RKSE: Tensor, place_R: Tensor) -> None:
        super().__init__()
        self.keys_RKSE, self.values_RKSE, self.place_R = keys_RKSE, values_RKSE, place_R
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it is made whole."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self.keys_RKSE, self.values_RKSE
        for held_RKSE, new_RK1E in zip(held, (key_states, value_states), strict=True):
            held_RKSE.scatter_(2, self.place_R.view(-1, 1, 1, 1).expand(new_RK1E.shape), new_RK1E)
        return held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys_RKSE.shape[2], 0

    def get_seq_length(self) -> int:
        """Not nothing, so that the forward is that of a token after others. Places are given by `position_ids`."""
        return 1

    def get_max_length(self) -> int:
        return self.keys_RKSE.shape[2]

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class StaticDecoder:
    """Rows of one cache, which may serve many calls. `graphs` captures a token of each size of batch."""

    can_refill = True

    def __init__(self, lm: nn.Module, *, pad_id: int, graphs: bool) -> None:
        self.lm, self.pad_id = lm, pad_id
        weight = causal_of(lm).get_input_embeddings().weight  # which is whole where layers are gathered
        self.device, self.dtype = weight.device, weight.dtype
        self.graphs = Graphs(self.device, enabled=graphs)
        self._addresses = addresses_of(lm)
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values, once it is known what a layer holds
        self.rows = self.columns = 0
        self.bytes_of_position = 0

    def reads(self, lm: nn.Module) -> bool:
        """Whether its graphs read these weights, which `lm` may be another module tree over."""
        return addresses_of(lm) == self._addresses

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * self._measure_position() if self.rows else 0

    # Rows -----------------------------------------------------------------------------------------------------------

    def rows_within(self, limits: BatchLimits, longest_prompt: int, limit: int, draws: int) -> int:
        needed = longest_prompt + limit
        wanted = max(1, min(limits.max_rows, limits.cache_tokens // needed, draws))
        if bucket_of(wanted) > self.rows or needed > self.columns:
            self.free()  # before what is free is counted
            columns = -(-needed // COLUMN_STEP) * COLUMN_STEP
            wanted = min(wanted, self._rows_that_fit(columns))
            self._allocate(bucket_of(wanted), columns)
        return wanted

    def _rows_that_fit(self, columns: int) -> int:
        if self.device.type != "cuda":
            return 2**31
        rows = int(CACHE_SHARE * free_bytes(self.device)) // (columns * self._measure_position())
        return max(1, next((size for size in range(rows, 0, -1) if bucket_of(size) <= rows), 1))

    def _measure_position(self) -> int:
        """Bytes of a position in all layers, learnt from a prompt of one token."""
        if not self.bytes_of_position:
            cache, _ = self._run_prompts([(self.pad_id,)])
            shapes = [part[0, :, 0] for layer in held_layers(cache) for part in layer]
            self.bytes_of_position = sum(part.numel() * part.element_size() for part in shapes)
        return self.bytes_of_position

    def _allocate(self, rows: int, columns: int) -> None:
        cache, logits_1V = self._run_prompts([(self.pad_id,)])
        self.rows, self.columns = rows, columns
        # Zeros, because what is hidden must be finite: NaN times a weight of 0 is NaN.
        self.layers = [
            (keys.new_zeros(rows, keys.shape[1], columns, keys.shape[3]),
             values.new_zeros(rows, values.shape[1], columns, values.shape[3]))
            for keys, values in held_layers(cache)
        ]  # fmt: skip
        self.length_R = torch.zeros(rows, dtype=torch.long, device=self.device)  # keys in the cache
        self.token_R, self.open_R = self.length_R.clone(), self.length_R.bool()
        self.logits_RV = logits_1V.new_zeros(rows, logits_1V.shape[1])

    def free(self) -> None:
        """Give back the cache and everything captured, which reads it."""
        self.graphs.clear()
        self.layers, self.rows, self.columns = [], 0, 0
        self.logits_RV = torch.empty(0, device=self.device)

    def release(self, slot: int) -> None:
        self.open_R[slot].fill_(False)

    def keep(self, slots: Sequence[int]) -> None:
        slot_n = self._upload(slots)
        for held in (*(part for layer in self.layers for part in layer), self.length_R):
            held[: len(slots)] = held.index_select(0, slot_n)
        self.open_R.fill_(False)
        self.open_R[: len(slots)] = True

    def _upload(self, numbers: Sequence[int]) -> Tensor:
        return upload(torch.tensor(numbers, dtype=torch.long), self.device)

    # Forward passes -------------------------------------------------------------------------------------------------

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Each distinct prompt is prefilled once; its rows get copies."""
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        cache, logits_nV = self._run_prompts(distinct)
        width = max(map(len, distinct))
        place = {prompt: number for number, prompt in enumerate(distinct)}
        place_m, slot_m = self._upload([place[tuple(prompt)] for prompt in prompts]), self._upload(slots)
        length_m = self._upload([len(prompt) for prompt in prompts])
        # From the right end of a rectangle to the left: what stands behind a prompt there is never looked at.
        column_mW = (torch.arange(width, device=self.device) + (width - length_m).unsqueeze(1)).clamp(max=width - 1)
        for held, filled in zip(self.layers, held_layers(cache), strict=True):
            for part_RKSE, new_nKWE in zip(held, filled, strict=True):
                new_mKWE = new_nKWE.index_select(0, place_m)
                index = column_mW[:, None, :, None].expand(new_mKWE.shape)
                part_RKSE[:, :, :width].index_copy_(0, slot_m, new_mKWE.gather(2, index))
        self.length_R.index_copy_(0, slot_m, length_m)
        self.open_R.index_fill_(0, slot_m, True)
        return logits_nV.index_select(0, place_m)

    def step(self, token_b: Tensor) -> Tensor:
        size = bucket_of(len(token_b))
        self.token_R[: len(token_b)] = token_b
        self.graphs.run(size, lambda: self._forward(size))
        return self.logits_RV[: len(token_b)]

    def _forward(self, size: int) -> None:
        """A token of the first `size` rows. Nothing here depends on the host."""
        place_B = self.length_R[:size]
        # As numbers to add, which every kind of attention takes.
        seen_BS = torch.arange(self.columns, device=self.device) <= place_B.unsqueeze(1)
        lowest = torch.finfo(self.dtype).min
        mask_BS = torch.zeros_like(seen_BS, dtype=self.dtype).masked_fill_(~seen_BS, lowest)
        layers = [RowsLayer(keys[:size], values[:size], place_B) for keys, values in self.layers]
        logits_BV = self.lm(
            input_ids=self.token_R[:size].unsqueeze(1), attention_mask=mask_BS[:, None, None],
            position_ids=place_B.unsqueeze(1), past_key_values=Cache(layers=layers), use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        self.logits_RV[:size] = logits_BV
        # A row that is finished stays where it is, and writes its one position again and again.
        self.length_R[:size] += self.open_R[:size]

    def _run_prompts(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Cache, Tensor]:
        """The model's own cache of prompts, padded on the left, and the logits after each."""
        width = max(map(len, prompts))
        ids_nW = self._upload([t for p in prompts for t in (*[self.pad_id] * (width - len(p)), *p)]).view(-1, width)
        mask_nW = self._upload([int(i >= width - len(p)) for p in prompts for i in range(width)]).view(-1, width)
        cache = DynamicCache(config=self.lm.config)
        logits_nV = self.lm(
            input_ids=ids_nW, attention_mask=mask_nW, position_ids=(mask_nW.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        return cache, logits_nV


def held_layers(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer. Raises NotHeld where one keeps anything else."""
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if others or not cache.layers:
        raise NotHeld(f"layers keep more than keys and values ({', '.join(sorted(others)) or 'no cache at all'})")
    return [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]


def addresses_of(lm: nn.Module) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in (*lm.parameters(), *lm.buffers()))
