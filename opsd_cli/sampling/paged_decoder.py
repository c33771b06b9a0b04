"""The forward pass of the decoders of the Llama family for a GPU. One token of a batch has the same shapes and
addresses whatever the lengths of its rows are, so `device_loop` can capture it in a graph; prompts are prefilled one
behind the other, uncaptured.

A slot of the batch is an entry of a table that names a row: of the cache, of the tables of tokens and lengths. Slots
move by editing it, and nothing else moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsd_cli.data.pairing import upload
from opsd_cli.engine.device import free_bytes
from opsd_cli.engine.loading import causal_of
from opsd_cli.engine.packed import packed_attention, row_groups
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.graphs import Branch, bucket_of
from opsd_cli.sampling.live_weights import LiveLayer, LiveWeights
from opsd_cli.sampling.llama_weights import FUSED_BYTES
from opsd_cli.sampling.paged_attention import PAGE, PagedAttention, PagedCache, gated, has_kernels

PREFILL_TOKENS = 16384  # at most, in one forward pass over prompts
CACHE_SHARE = 0.9  # of the free memory, which a cache may take
POOL_STEPS = 8  # the number of pages is rounded up by less than this share, so that similar calls find room in them


class PagedDecoder:
    """The weights of one model and a cache in pages, both of which may serve many calls. `llama_weights.supports` must
    hold. Where addresses change, `generation` does too: what was captured before is void."""

    can_refill = True

    def __init__(
        self, lm: nn.Module, *, lent: bool = True, kernels: bool | None = None, fused_bytes: int = FUSED_BYTES
    ) -> None:
        causal = causal_of(lm)
        attention = causal.model.layers[0].self_attn
        self.weights = LiveWeights(lm, lent=lent, fused_bytes=fused_bytes)
        # Replaced one by one where `choose_decoder` compares layers.
        self.layers: Sequence[LiveLayer] = self.weights.model.layers
        self.final_norm: nn.Module | None = None
        self.embedding = self.weights.model.embedding
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.kernels = has_kernels(self.device) if kernels is None else kernels
        self.eps = causal.model.norm.variance_epsilon
        self.scale, self.head_size = attention.scaling, attention.head_dim
        self.query_heads, self.kv_heads = causal.config.num_attention_heads, causal.config.num_key_value_heads
        self.vocabulary = sum(map(len, self.weights.model.head.weights))
        self._rotary = causal.model.rotary_emb
        self.branch: Branch | None = None  # set where tokens are captured
        self.forget_captured: Callable[[], None] = lambda: None  # set by who captures
        self.generation = 0
        self.cache: PagedCache | None = None
        self.rotation_S2E = self.embedding.new_zeros(0, 2, self.head_size)
        self.row_of: list[int] = []  # of each slot
        self.live: set[int] = set()  # slots

    # Rows -----------------------------------------------------------------------------------------------------------

    def rows_within(self, limits: BatchLimits, longest_prompt: int, limit: int, draws: int) -> int:
        pages_per_row = -(-(longest_prompt + limit) // PAGE)
        most_pages = limits.cache_tokens // PAGE
        wanted = max(1, min(limits.max_rows, most_pages // pages_per_row, draws))
        self._rotate_up_to(pages_per_row * PAGE)
        # Fewer rows at once rather than none: the whole cache is allocated here, whatever lengths will occur.
        rows = wanted
        if not self._has_room(rows, pages_per_row):
            rows = max(1, min(wanted, self._pages_that_fit() // pages_per_row))
        if not self._has_room(rows, pages_per_row):
            # The present cache goes first, and what was captured with it, which holds memory of its own: then what is
            # free is counted once more.
            self.free()
            most_pages = min(most_pages, self._pages_that_fit())
            rows = max(1, min(wanted, most_pages // pages_per_row))
            pages = rows * pages_per_row
            grain = max(1, 2 ** (pages.bit_length() - 1) // POOL_STEPS)
            self._allocate(
                max(rows, limits.max_rows), max(pages, min(most_pages, -(-pages // grain) * grain)), pages_per_row
            )
        assert self.cache is not None
        self.cache.deal(rows, pages_per_row)
        self.live.clear()
        return rows

    def _has_room(self, rows: int, pages_per_row: int) -> bool:
        return self.cache is not None and self.cache.fits(rows, rows * pages_per_row, pages_per_row)

    def _pages_that_fit(self) -> int:
        """In the memory that this device has free, or would have without the present cache."""
        if self.device.type != "cuda":
            return 2**40
        own = 0 if self.cache is None else self.cache.bytes
        page = (
            len(self.weights.model.layers) * 2 * self.kv_heads * PAGE * self.head_size * self.embedding.element_size()
        )
        return int(CACHE_SHARE * (free_bytes(self.device) + own)) // page

    def _allocate(self, rows: int, pages: int, pages_per_row: int) -> None:
        self.cache = PagedCache(
            layers=len(self.weights.model.layers), kv_heads=self.kv_heads, head_size=self.head_size, rows=rows,
            pages=pages, pages_per_row=pages_per_row, dtype=self.dtype, device=self.device,
        )  # fmt: skip
        self.generation += 1
        self._attend_to_cache()
        table_R = torch.zeros(rows + 1, dtype=torch.long, device=self.device)
        self.length_R, self.token_R = table_R, table_R.clone()  # keys in the cache; the token that comes next
        self.open_R = table_R.bool()  # rows that take tokens: not finished, not free, not the spare one
        # The row of each slot, then the spare row up to a whole bucket.
        self.batch_R = torch.full((bucket_of(rows),), rows, dtype=torch.long, device=self.device)

    def free(self) -> None:
        """Give the cache's memory back, and that of what was captured with it. The weights stay."""
        self.forget_captured()
        if self.cache is not None:
            del self.attention  # which holds it too
            self.cache, self.generation = None, self.generation + 1

    def _rotate_up_to(self, positions: int) -> None:
        """Make the table of rotations long enough: cosines, and sines with the sign of the half that they multiply."""
        if positions <= len(self.rotation_S2E):
            return
        # In powers of two, so that it is seldom replaced.
        positions_1S = torch.arange(max(4096, 1 << (positions - 1).bit_length()), device=self.device).unsqueeze(0)
        cos_SE, sin_SE = (table[0] for table in self._rotary(self.embedding[:1].unsqueeze(0), positions_1S))
        half = self.head_size // 2
        signed_SE = torch.cat([-sin_SE[:, :half], sin_SE[:, half:]], dim=1)
        self.rotation_S2E = torch.stack([cos_SE, signed_SE], dim=1)
        self.generation += 1
        if self.cache is not None:
            self._attend_to_cache()

    def _attend_to_cache(self) -> None:
        assert self.cache is not None
        self.attention = PagedAttention(
            self.cache, self.rotation_S2E, scale=self.scale, eps=self.eps, kernels=self.kernels
        )

    def release(self, slot: int) -> None:
        self.live.discard(slot)
        self.open_R[self.row_of[slot]].fill_(False)

    def keep(self, slots: Sequence[int]) -> None:
        self.row_of = [self.row_of[slot] for slot in slots]
        self.live = set(range(len(slots)))
        self._upload_batch()

    def rows_of_batch(self, size: int) -> Tensor:
        """The rows of all slots and then the spare one, `size` together, at an address that stays."""
        return self.batch_R[:size]

    def _upload_batch(self) -> None:
        assert self.cache is not None
        spare = [self.cache.rows] * (len(self.batch_R) - len(self.row_of))
        self.batch_R.copy_(self.upload([*self.row_of, *spare]))

    def upload(self, numbers: Sequence[int]) -> Tensor:
        """Integers to the device, without waiting for it."""
        return upload(torch.tensor(numbers, dtype=torch.long), self.device)

    # Forward passes -------------------------------------------------------------------------------------------------

    def step(self, token_b: Tensor) -> Tensor:
        """One token of every slot, [b, V]."""
        row_b = self.batch_R[: len(self.row_of)]
        self.token_R.index_copy_(0, row_b, token_b)
        return self.forward(row_b)

    def forward(self, row_B: Tensor) -> Tensor:
        """Put each row's next token into the cache; the logits after it, [B, V]. Nothing here depends on the host."""
        position_B = self.length_R[row_B]
        x_BD = F.embedding(self.token_R[row_B], self.embedding)
        for number, layer in enumerate(self.layers):
            raw_BX = layer.query_key_value(self._norm(x_BD, layer.input_norm), self.branch)
            heads_BHE = self.attention.rotate_and_store(number, raw_BX, layer.head_gains, row_B, position_B)
            attended_BHE = self.attention.attend(number, heads_BHE, row_B, position_B)
            x_BD = self._finish_layer(x_BD, attended_BHE.flatten(1), layer, self.branch)
        # A row that is finished stays where it is, and writes its one position again and again.
        self.length_R.index_copy_(0, row_B, position_B + self.open_R[row_B])
        return self._logits(x_BD)

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Each distinct prompt is prefilled once, in passes of at most PREFILL_TOKENS."""
        if not self.live:
            self.row_of = list(range(len(slots)))
            self._upload_batch()
        self.live.update(slots)
        row_of_slot = {slot: self.row_of[slot] for slot in slots}
        rows: dict[tuple[int, ...], list[int]] = {}
        for slot, prompt in zip(slots, prompts, strict=True):
            rows.setdefault(tuple(prompt), []).append(row_of_slot[slot])
        passes: list[list[tuple[int, ...]]] = [[]]
        for prompt in rows:
            if passes[-1] and sum(map(len, passes[-1])) + len(prompt) > PREFILL_TOKENS:
                passes.append([])
            passes[-1].append(prompt)
        logits_nV = torch.cat([self._prefill(some, [rows[prompt] for prompt in some]) for some in passes])
        place = {prompt: number for number, prompt in enumerate(rows)}
        row_n, length_n, place_n = self.upload(
            [*row_of_slot.values(), *map(len, prompts), *(place[tuple(prompt)] for prompt in prompts)]
        ).chunk(3)
        self.length_R.index_copy_(0, row_n, length_n)
        self.open_R.index_fill_(0, row_n, True)
        return logits_nV.index_select(0, place_n)

    def _prefill(self, prompts: Sequence[tuple[int, ...]], rows: Sequence[list[int]]) -> Tensor:
        """Run prompts one behind the other, N tokens, into the first of each one's rows, and copy its pages to the
        others. The logits after each prompt."""
        assert self.cache is not None
        lengths = [len(prompt) for prompt in prompts]
        total = sum(lengths)
        own = [row for length, (row, *_) in zip(lengths, rows, strict=True) for _ in range(length)]
        ends = [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]
        source, target = self._copies(lengths, rows)
        id_N, row_N, position_N, end_n, source_p, target_p = self.upload(
            [*(t for prompt in prompts for t in prompt), *own, *(i for n in lengths for i in range(n)), *ends,
             *source, *target]
        ).split([total, total, total, len(ends), len(source), len(target)])  # fmt: skip
        groups = row_groups(lengths, self.device)
        counts = (self.query_heads, self.kv_heads, self.kv_heads)
        x_ND = F.embedding(id_N, self.embedding)
        for number, layer in enumerate(self.layers):
            raw_NX = layer.query_key_value(self._norm(x_ND, layer.input_norm))
            heads_NHE = self.attention.rotate_and_store(number, raw_NX, layer.head_gains, row_N, position_N)
            if source:
                pages_2pKcE = self.cache.layers[number]
                pages_2pKcE.index_copy_(1, target_p, pages_2pKcE.index_select(1, source_p))
            parts = (part.transpose(0, 1).unsqueeze(0) for part in heads_NHE.split(counts, dim=1))
            attended, _ = packed_attention(nn.Identity(), *parts, None, rows=groups, scaling=self.scale)
            attended_NA = attended[0].flatten(1)
            # After the last attention only the last token of each prompt is needed: its logits draw the next one.
            if number == len(self.layers) - 1:
                x_ND, attended_NA = x_ND[end_n], attended_NA[end_n]
            x_ND = self._finish_layer(x_ND, attended_NA, layer)
        return self._logits(x_ND)

    def _copies(self, lengths: Sequence[int], rows: Sequence[list[int]]) -> tuple[list[int], list[int]]:
        """Pages to copy and where to, for prompts with more than one row."""
        assert self.cache is not None
        source, target = list[int](), list[int]()
        for length, (first, *others) in zip(lengths, rows, strict=True):
            for other in others:
                source += self.cache.pages_of(first, length)
                target += self.cache.pages_of(other, length)
        return source, target

    def _norm(self, x_ND: Tensor, gain_D: Tensor) -> Tensor:
        return F.rms_norm(x_ND, gain_D.shape, gain_D, self.eps)

    def _finish_layer(
        self, x_ND: Tensor, attended_NA: Tensor, layer: LiveLayer, branch: Branch | None = None
    ) -> Tensor:
        """The rest of the layer: output projection and gated MLP, each added to the residual stream in place."""
        x_ND = layer.output.add_to(x_ND, attended_NA, branch)
        gate_up_NM = layer.gate_up(self._norm(x_ND, layer.mlp_norm), branch)
        return layer.down.add_to(x_ND, gated(gate_up_NM, kernels=self.kernels), branch)

    def _logits(self, x_ND: Tensor) -> Tensor:
        final = self.weights.model.final_norm
        normed_ND = self._norm(x_ND, final) if self.final_norm is None else self.final_norm(x_ND)
        return self.weights.model.head(normed_ND)
