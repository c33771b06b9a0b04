"""What PyTorch's fused attention kernels on a GPU require of their arguments and do not check themselves, for decoding
and for the packed rows of training."""

from __future__ import annotations

from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGN = 8  # elements, which are 16 bytes in half precision: what one load of these kernels takes
HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256  # of the kernels that take fewer key heads than query heads


def align_down(columns: int) -> int:
    return columns - columns % ALIGN


def align_up(columns: int) -> int:
    return align_down(columns + ALIGN - 1)


def aligned_mask(mask: Tensor) -> Tensor:
    """The same additive mask [b, heads or 1, queries or 1, keys], checked to be one that a kernel can load in whole
    vectors: address, strides and width are multiples of ALIGN elements."""
    # `scaled_dot_product_attention` copies a mask whose strides are not aligned, but never looks at its address: a
    # slice that begins inside a vector ends in "CUDA error: misaligned address" (pytorch #183484 is the same in keys).
    # A width that is a multiple of 8 is also never 1 modulo 32, where wrong results were reported (pytorch #191937).
    *strides, last = mask.stride()
    past = mask.data_ptr() % (ALIGN * mask.element_size())
    aligned = past == 0 and last == 1 and all(size % ALIGN == 0 for size in (*strides, mask.shape[-1]))
    assert aligned, (
        f"a mask of shape {tuple(mask.shape)}, strides {mask.stride()}, {past} bytes past an aligned address: its "
        f"start, its outer strides and its width must be multiples of {ALIGN} elements"
    )
    return mask


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float = 0.0) -> Tensor:
    """Causal attention over [rows, heads, tokens, head size], where keys and values may have fewer heads than queries,
    in memory linear in the tokens."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and not takes_groups(query):
        each = query.shape[1] // key.shape[1]
        key, value = (heads.repeat_interleave(each, dim=1) for heads in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=grouped
    )


def takes_groups(query: Tensor) -> bool:
    """Whether a fused kernel takes fewer key heads than query heads as they are."""
    # For fp32 and for larger heads `enable_gqa` silently selects the plain kernel on a GPU, which stores the [tokens,
    # tokens] scores of every head (pytorch #181528).
    return query.device.type == "cpu" or (query.dtype in HALF and query.shape[-1] <= LARGEST_HEAD)


def rows_attention(
    query_LHE: Tensor, key_LhE: Tensor, value_LhE: Tensor, bounds: Tensor, *, longest: int, scale: float | None
) -> Tensor:
    """Causal attention within rows of any lengths that lie one after another, [L, H, E], by torch's kernel for them:
    FlashAttention's, on GPUs from Ampere on, in half precision. `bounds`: where each row begins, and where the last one
    ends (int32, B + 1 of them). It raises RuntimeError for what it does not take."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, which takes seconds

    # torch 2.11 takes fewer key heads as they are; later ones want to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    out_LHE = varlen_attn(
        query_LHE, key_LhE, value_LhE, bounds, bounds, longest, longest,
        scale=scale, window_size=(-1, 0), **grouped,
    )  # fmt: skip
    assert isinstance(out_LHE, Tensor)  # a pair only where more is asked for
    return out_LHE
