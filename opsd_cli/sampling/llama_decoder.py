"""The forward pass of the decoders of the Llama family (Llama, Mistral, Qwen2, Qwen3) for generation, with as few and
as large operations as possible: what one token costs in a small batch is its Python and its kernel launches.

Cache: one tensor [rows, 2 x kv heads, columns, head size] per layer, keys before values. All rows write the same
column, so a write is one copy into a narrow view; a row that enters later begins at a later column, and an additive
mask hides what is left of it. When the columns are used up, either those that no live row needs are dropped and the
rest moves to the front, or their number is doubled, up to what the longest row can need and some more: memory follows
the lengths that occur.

Where there is a mask, attention sees whole groups of ALIGN columns, as the kernels of a GPU require; the number of
columns is a multiple of ALIGN too, and with it every stride.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsd_cli.engine.fused_attention import align_down, align_up, aligned_mask, causal_attention
from opsd_cli.engine.loading import causal_of
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.llama_weights import Layer, layers_of, make_norm, projection_of

PREFILL_TOKENS = 16384  # at most, in one forward pass over prompts
FIRST_COLUMNS = 256  # beyond the longest prompt, before the cache grows
SLACK = 4  # one column in so many must come free in a move; one in so many is also the room beyond the longest row


class LlamaDecoder:
    """The weights of one model as they are now, and a cache. `supports` must hold."""

    can_refill = True

    @torch.no_grad()  # else a copy of a weight would keep the weight alive, for a gradient
    def __init__(self, lm: nn.Module) -> None:
        causal = causal_of(lm)
        self.model = causal.model
        self.embedding = self.model.embed_tokens.weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.head = projection_of(causal.lm_head)
        self.final_norm = make_norm(self.model.norm.weight, self.model.norm.variance_epsilon)
        attention = self.model.layers[0].self_attn
        self.head_size, self.scale = attention.head_dim, attention.scaling
        self.query_heads, self.kv_heads = causal.config.num_attention_heads, causal.config.num_key_value_heads
        self.layers = layers_of(causal)
        self.starts: dict[int, int] = {}  # of live slots: the column of their first token
        self.column = 0  # the next one to be written
        self.rows = 0
        self.position_b = torch.zeros(0, dtype=torch.long, device=self.device)

    # The cache ------------------------------------------------------------------------------------------------------

    def rows_within(self, limits: BatchLimits, longest_prompt: int, limit: int, draws: int) -> int:
        """Also allocates the cache and the table of rotations."""
        longest = longest_prompt + limit
        columns = align_up(longest)
        rows = min(limits.max_rows, limits.cache_tokens // columns)
        # Where some rows enter while others run, a row may start late: without room beyond the longest row the columns
        # would have to move at every token.
        if draws > rows:
            columns = align_up(longest + longest // SLACK + 1)
            rows = min(limits.max_rows, limits.cache_tokens // columns)
        rows = max(1, min(rows, draws))
        self.most_columns, self.longest_prompt = columns, longest_prompt
        self.columns = min(columns, align_up(longest_prompt + FIRST_COLUMNS))
        shape = (rows, 2 * self.kv_heads, self.columns, self.head_size)
        # Zeros, because the mask does not help against a NaN in a column that is not written yet: NaN times 0 is NaN.
        self.cache = [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in self.layers]
        self.mask_RC = torch.full((rows, self.columns), -torch.inf, device=self.device, dtype=self.dtype)
        positions_1S = torch.arange(longest + 1, device=self.device).unsqueeze(0)
        cos_SE, sin_SE = (table[0] for table in self.model.rotary_emb(self.embedding[:1].unsqueeze(0), positions_1S))
        # A rotation takes (a, b) to (a cos - b sin, b cos + a sin), halves a and b of a head. With the sign in the
        # table it is x * cos + roll(x) * sin: no half is negated or concatenated at every token.
        half = self.head_size // 2
        signed_SE = torch.cat([-sin_SE[:, :half], sin_SE[:, half:]], dim=1)
        self.rotation_S2E = torch.stack([cos_SE, signed_SE], dim=1)
        return rows

    def release(self, slot: int) -> None:
        del self.starts[slot]

    def keep(self, slots: Sequence[int]) -> None:
        slot_n = torch.tensor(slots, device=self.device)
        # Rows move to the front in place; only the columns that some live row uses are copied.
        first, n = min(self.starts.values()), len(slots)
        for cache in self.cache:
            cache[:n, :, first : self.column] = cache[slot_n, :, first : self.column]
        self.mask_RC[:n] = self.mask_RC[slot_n]
        self.position_b = self.position_b[slot_n]
        self.starts = {i: self.starts[slot] for i, slot in enumerate(slots)}
        self.rows = n

    def _make_room(self) -> None:
        """Free columns: drop those before every live row, or allocate more where that would free few."""
        # A prompt that enters ends at the current column, so the longest one must fit before it.
        unused = min(*self.starts.values(), self.column - self.longest_prompt)
        if unused < self.columns // SLACK and self.columns < self.most_columns:
            added = min(self.columns, self.most_columns - self.columns)
            self.columns += added
            for i, cache in enumerate(self.cache):
                self.cache[i] = F.pad(cache, (0, 0, 0, added))
            self.mask_RC = F.pad(self.mask_RC, (0, added), value=-torch.inf)
            return
        assert unused > 0, "the cache has fewer columns than its longest row"
        for table in (*self.cache, self.mask_RC.unsqueeze(1).unsqueeze(3)):
            # A copy first: source and target overlap.
            table[:, :, : self.column - unused] = table[:, :, unused : self.column].clone()
        self.mask_RC[:, self.column - unused :] = -torch.inf
        self.starts = {slot: start - unused for slot, start in self.starts.items()}
        self.column -= unused

    def _window(self) -> tuple[slice, Tensor | None]:
        """The columns that a token attends to, the newest included, and the mask over them, if one is needed."""
        first, end = min(self.starts.values()), self.column + 1
        # Rows that all begin at one column need no mask, and without one the kernels take any slice.
        if all(start == first for start in self.starts.values()):
            return slice(first, end), None
        window = slice(align_down(first), align_up(end))
        return window, aligned_mask(self.mask_RC[: self.rows, None, None, window])

    # Forward passes -------------------------------------------------------------------------------------------------

    def step(self, token_b: Tensor) -> Tensor:
        """One token of every row, [b, V]."""
        if self.column == self.columns:
            self._make_room()
        b, column = self.rows, self.column
        self.mask_RC[:b, column] = 0
        window, mask_b11W = self._window()
        # Finished rows run on until they are taken out, past the end of the table.
        self.position_b.add_(1).clamp_(max=len(self.rotation_S2E) - 1)
        cos_b1E, sin_b1E = self.rotation_S2E[self.position_b].split(1, dim=1)
        x_bD = F.embedding(token_b, self.embedding)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            heads_bHE = self._attention_input(x_bD, layer, cos_b1E, sin_b1E)
            cache[:b, :, column] = heads_bHE[:, self.query_heads :]
            key_value_bKWE = cache[:b, :, window]
            # The query heads of one key head stand where positions usually stand, so that nothing is repeated.
            attended = F.scaled_dot_product_attention(
                heads_bHE[:, : self.query_heads].view(b, self.kv_heads, -1, self.head_size),
                key_value_bKWE[:, : self.kv_heads],
                key_value_bKWE[:, self.kv_heads :],
                attn_mask=mask_b11W,
                scale=self.scale,
            )
            x_bD = self._attention_output(x_bD, attended.reshape(b, -1), layer)
        self.column += 1
        return self.head(self.final_norm(x_bD))

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Each distinct prompt is prefilled once, in passes of similar length."""
        # With no live row the columns start over: the longest prompt begins at column 0.
        if not self.starts:
            self.column, self.rows = max(len(prompt) for prompt in prompts), len(slots)
            self.position_b = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        self.starts |= {slot: self.column - len(prompt) for slot, prompt in zip(slots, prompts, strict=True)}
        groups: dict[tuple[int, ...], list[int]] = {}
        for slot, prompt in zip(slots, prompts, strict=True):
            groups.setdefault(tuple(prompt), []).append(slot)
        logits: dict[int, Tensor] = {}
        batch: list[tuple[int, ...]] = []
        # Longest first: the first prompt of a pass is its width.
        for prompt in sorted(groups, key=len, reverse=True):
            if batch and (len(batch) + 1) * len(batch[0]) > PREFILL_TOKENS:
                self._prefill(batch, groups, logits)
                batch = []
            batch.append(prompt)
        self._prefill(batch, groups, logits)
        return torch.stack([logits[slot] for slot in slots])

    def _prefill(
        self, prompts: list[tuple[int, ...]], groups: dict[tuple[int, ...], list[int]], logits: dict[int, Tensor]
    ) -> None:
        """Run n prompts one behind the other, N tokens without padding except in attention, and write each to the cache
        of its slots: s slots in all. Adds their logits to `logits`."""
        n, width = len(prompts), len(prompts[0])
        assert width <= self.column, "a prompt longer than the columns in use"
        lengths_n = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        slots = [slot for prompt in prompts for slot in groups[prompt]]
        slot_s = torch.tensor(slots, device=self.device)
        prompt_s = torch.tensor([i for i, prompt in enumerate(prompts) for _ in groups[prompt]], device=self.device)
        # Attention alone runs on a rectangle [n, width], padded on the right, where causality is mask enough. A cell is
        # the place of a token in it, flattened; cells of padding stay zero and are never read back.
        is_token_nS = torch.arange(width, device=self.device) < lengths_n.unsqueeze(1)
        position_N = is_token_nS.nonzero()[:, 1]
        cell_N = is_token_nS.flatten().nonzero().squeeze(1)
        ends_n = lengths_n.cumsum(0) - 1
        # In the cache prompts end together, at the current column, so padding must stand on the left there: each row
        # of the rectangle is rotated by its padding on the way, and the mask hides the part before its first token.
        rotated_nS = (torch.arange(width, device=self.device) + (lengths_n - width).unsqueeze(1)) % width
        start = self.column - width
        cos_N1E, sin_N1E = self.rotation_S2E[position_N].split(1, dim=1)
        x_ND = F.embedding(torch.tensor([t for prompt in prompts for t in prompt], device=self.device), self.embedding)
        padded_CHE = x_ND.new_zeros(n * width, self.query_heads + 2 * self.kv_heads, self.head_size)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            padded_CHE[cell_N] = self._attention_input(x_ND, layer, cos_N1E, sin_N1E)
            heads_nSHE = padded_CHE.view(n, width, -1, self.head_size)
            # One indexing does three things: repeats a prompt for each of its slots, rotates it, and drops the queries.
            key_value_sSKE = heads_nSHE[prompt_s.unsqueeze(1), rotated_nS[prompt_s], self.query_heads :]
            cache[:, :, start : self.column].index_copy_(0, slot_s, key_value_sSKE.transpose(1, 2))
            query, key, value = heads_nSHE.transpose(1, 2).split(
                (self.query_heads, self.kv_heads, self.kv_heads), dim=1
            )
            attended = causal_attention(query, key, value, scale=self.scale)
            attended_NA = attended.transpose(1, 2).reshape(n * width, -1)[cell_N]
            # After the last attention only the last token of each prompt is needed: its logits draw the next one.
            if layer is self.layers[-1]:
                x_ND, attended_NA = x_ND[ends_n], attended_NA[ends_n]
            x_ND = self._attention_output(x_ND, attended_NA, layer)
        column_C = torch.arange(self.columns, device=self.device)
        hidden_sC = (column_C < (self.column - lengths_n[prompt_s]).unsqueeze(1)) | (column_C >= self.column)
        self.mask_RC[slot_s] = torch.zeros_like(hidden_sC, dtype=self.dtype).masked_fill_(hidden_sC, -torch.inf)
        self.position_b[slot_s] = lengths_n[prompt_s] - 1
        logits |= dict(zip(slots, self.head(self.final_norm(x_ND))[prompt_s], strict=True))

    def _attention_input(self, x_ND: Tensor, layer: Layer, cos_N1E: Tensor, sin_N1E: Tensor) -> Tensor:
        """Rotated queries, rotated keys and values side by side, [N, heads, E]."""
        heads_NHE = layer.query_key_value(layer.input_norm(x_ND)).view(len(x_ND), -1, self.head_size)
        # Queries and keys stand together, so one operation rotates both, into the place they came from.
        rotated_NHE = heads_NHE[:, : self.query_heads + self.kv_heads]
        source_NHE = rotated_NHE if layer.head_norm is None else layer.head_norm(rotated_NHE)
        rolled_NHE = source_NHE.roll(self.head_size // 2, dims=2)
        torch.addcmul(source_NHE * cos_N1E, rolled_NHE, sin_N1E, out=rotated_NHE)
        return heads_NHE

    def _attention_output(self, x_ND: Tensor, attended_NA: Tensor, layer: Layer) -> Tensor:
        """The rest of the layer: output projection and gated MLP, each added to the residual stream in place."""
        x_ND = layer.output.add_to(x_ND, attended_NA)
        gate_NM, up_NM = layer.gate_up(layer.mlp_norm(x_ND)).chunk(2, dim=1)
        return layer.down.add_to(x_ND, F.silu(gate_NM).mul_(up_NM))
