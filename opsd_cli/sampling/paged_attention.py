"""A key-value cache in pages, attention over it, and the gate of the MLP: in plain PyTorch for any device, by the
Triton kernels of `attention_kernels` on a GPU. How long a row is and which pages it has are tensors on the device, so
that what one token runs has the same shapes and addresses at every length, and can be captured in a graph.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = 64  # positions: the keys that a program of the kernel takes at a time
TABLE_WIDTH = 1024  # pages that a row can have before the table is replaced by a wider one


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels can be used: on a GPU with triton."""
    return device.type == "cuda" and find_spec("triton") is not None


def gated(gate_up_NM: Tensor, *, kernels: bool) -> Tensor:
    """silu(gate) * up, of both side by side, [N, M / 2]."""
    if kernels:
        from opsd_cli.sampling import attention_kernels

        return attention_kernels.gated(gate_up_NM)
    gate_Nm, up_Nm = gate_up_NM.chunk(2, dim=1)
    return F.silu(gate_Nm).mul_(up_Nm)


class PagedCache:
    """Keys and values of R rows, and of one spare row (the last), which rows of a batch that stand for nothing use."""

    def __init__(
        self, *, layers: int, kv_heads: int, head_size: int, rows: int, pages: int, pages_per_row: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.rows, self.pages = rows, pages
        # Zeros, because what is hidden must be finite: NaN times a weight of 0 is NaN.
        shape = (layers, 2, pages + 1, kv_heads, PAGE, head_size)
        self.layers = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.table_RP = torch.zeros(rows + 1, max(TABLE_WIDTH, pages_per_row), dtype=torch.long, device=device)
        self.bytes = self.layers[0].numel() * self.layers[0].element_size() * layers

    def fits(self, rows: int, pages: int, pages_per_row: int) -> bool:
        return rows <= self.rows and pages <= self.pages and pages_per_row <= self.table_RP.shape[1]

    def deal(self, rows: int, pages_per_row: int) -> None:
        """Give the first rows so many pages each, in order; every other entry is the spare page."""
        self.pages_per_row = pages_per_row
        assert rows * pages_per_row <= self.pages, "more pages dealt than there are"
        self.table_RP.fill_(self.pages)
        pages = torch.arange(rows * pages_per_row, device=self.table_RP.device)
        self.table_RP[:rows, :pages_per_row] = pages.view(rows, pages_per_row)

    def pages_of(self, row: int, tokens: int) -> range:
        """The pages of a row's first tokens."""
        first = row * self.pages_per_row
        return range(first, first + -(-tokens // PAGE))


class PagedAttention:
    """The heads of one kind of layer: rotation, norm of heads if the model has one, and attention over a layer of the
    cache. `kernels` selects the Triton kernels."""

    def __init__(self, cache: PagedCache, rotation_S2E: Tensor, *, scale: float, eps: float, kernels: bool) -> None:
        self.cache, self.rotation_S2E, self.scale, self.eps, self.kernels = cache, rotation_S2E, scale, eps, kernels
        self.kv_heads, self.head_size = cache.layers[0].shape[2], cache.layers[0].shape[4]

    def rotate_and_store(
        self, layer: int, raw_NX: Tensor, gains: tuple[Tensor, Tensor] | None, row_N: Tensor, position_N: Tensor
    ) -> Tensor:
        """From the projections of N tokens, queries, keys and values side by side, to their heads [N, H, E]: queries
        and keys normed with their gains, if there are any, and rotated by their positions. Keys and values are written
        to the cache of each token's row."""
        cache_2pKcE = self.cache.layers[layer]
        heads_NHE = raw_NX.view(len(raw_NX), -1, self.head_size)
        if self.kernels:
            from opsd_cli.sampling import attention_kernels

            out_NHE = torch.empty_like(heads_NHE)
            attention_kernels.rotate_and_store(
                raw_NX, gains, self.eps, self.rotation_S2E, cache_2pKcE, self.cache.table_RP, row_N, position_N,
                out_NHE,
            )  # fmt: skip
            return out_NHE
        counts = (heads_NHE.shape[1] - 2 * self.kv_heads, self.kv_heads, self.kv_heads)
        query, key, value = heads_NHE.split(counts, dim=1)
        if gains is not None:
            query, key = (
                F.rms_norm(x, (self.head_size,), gain, self.eps) for x, gain in zip((query, key), gains, strict=True)
            )
        cos_N1E, sin_N1E = self.rotation_S2E[position_N].split(1, dim=1)
        query, key = (torch.addcmul(x * cos_N1E, x.roll(self.head_size // 2, dims=2), sin_N1E) for x in (query, key))
        page_N = self.cache.table_RP[row_N, position_N // PAGE]
        kv_head_K = torch.arange(self.kv_heads, device=raw_NX.device)
        for part_pKcE, heads in zip(cache_2pKcE, (key, value), strict=True):
            part_pKcE[page_N[:, None], kv_head_K, (position_N % PAGE)[:, None]] = heads
        return torch.cat([query, key, value], dim=1)

    def attend(self, layer: int, heads_BHE: Tensor, row_B: Tensor, position_B: Tensor) -> Tensor:
        """What each row's queries read of its keys up to its position, [B, query heads, E]."""
        cache_2pKcE = self.cache.layers[layer]
        if self.kernels:
            from opsd_cli.sampling import attention_kernels

            return attention_kernels.attend(heads_BHE, cache_2pKcE, self.cache.table_RP, row_B, position_B, self.scale)
        rows = len(heads_BHE)
        page_BP = self.cache.table_RP[row_B, : self.cache.pages_per_row]
        # [B, P, K, c, E] -> [B, K, P * c, E]
        key, value = (part[page_BP].transpose(1, 2).flatten(2, 3) for part in cache_2pKcE)
        seen_BS = torch.arange(key.shape[2], device=key.device) <= position_B.unsqueeze(1)
        queries = heads_BHE[:, : -2 * self.kv_heads].reshape(rows, self.kv_heads, -1, self.head_size)
        out = F.scaled_dot_product_attention(queries, key, value, attn_mask=seen_BS[:, None, None], scale=self.scale)
        return out.reshape(rows, -1, self.head_size)
