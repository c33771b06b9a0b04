"""The Triton kernels of `paged_attention`: rotate heads and put keys and values into the cache; attend to a row's keys,
split over several programs; combine the parts; the gate of the MLP. Imported only where triton is installed. The plain
form of each, with which a test compares it, is in `paged_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SPLITS = 16
GATE_BLOCK = 1024


@dataclass(frozen=True)
class Tuning:
    """How attention is spread over a card. It decides speed, and the order in which sums are rounded."""

    programs: int = (
        264  # rows are split over their keys until there are so many: two for each multiprocessor of an H100
    )
    stages: int = 3  # pages of keys and values that are loaded ahead, if the shared memory of small cards holds them
    warps: int = 4


TUNED = Tuning()


def rotate_and_store(
    raw_NX: Tensor,
    gains: tuple[Tensor, Tensor] | None,
    eps: float,
    rotation_S2E: Tensor,
    cache_2pKcE: Tensor,
    table_RP: Tensor,
    row_N: Tensor,
    position_N: Tensor,
    heads_NHE: Tensor,
) -> None:
    """See `paged_attention.PagedAttention.rotate_and_store`."""
    tokens, heads, head_size = heads_NHE.shape
    _, pages, kv_heads, page, _ = cache_2pKcE.shape
    query_gain, key_gain = gains or (raw_NX, raw_NX)
    _rotate_and_store[(tokens, heads)](
        raw_NX, query_gain, key_gain, rotation_S2E, cache_2pKcE, table_RP, row_N, position_N, heads_NHE,
        eps, table_RP.shape[1], pages * kv_heads * page * head_size,
        HEADS=heads, KV=kv_heads, E=head_size, PAGE=page, HAS_GAIN=gains is not None,
        BLOCK_E=triton.next_power_of_2(head_size), num_warps=1,
    )  # fmt: skip


@triton.jit
def _rotate_and_store(
    raw_ptr, query_gain_ptr, key_gain_ptr, rotation_ptr, cache_ptr, table_ptr, row_ptr, position_ptr, heads_ptr,
    eps, table_width, value_offset,
    HEADS: tl.constexpr, KV: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, HAS_GAIN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    half: tl.constexpr = E // 2
    partner = tl.where(e < half, e + half, e - half)
    raw_ptr += (token * HEADS + head) * E
    x = tl.load(raw_ptr + e, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + token)
    if head < HEADS - KV:
        other = tl.load(raw_ptr + partner, mask=inside, other=0.0).to(tl.float32)
        if HAS_GAIN:
            per_length = tl.rsqrt(tl.sum(x * x) / E + eps)
            gain_ptr = query_gain_ptr if head < HEADS - 2 * KV else key_gain_ptr
            x = x * per_length * tl.load(gain_ptr + e, mask=inside, other=0.0).to(tl.float32)
            other = other * per_length * tl.load(gain_ptr + partner, mask=inside, other=0.0).to(tl.float32)
        # A rotation takes (a, b) to (a cos - b sin, b cos + a sin), halves a and b of a head; the sign is in the table.
        rotation_ptr += position * 2 * E
        cos = tl.load(rotation_ptr + e, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(rotation_ptr + E + e, mask=inside, other=0.0).to(tl.float32)
        x = x * cos + other * sin
    tl.store(heads_ptr + (token * HEADS + head) * E + e, x.to(heads_ptr.dtype.element_ty), mask=inside)
    if head >= HEADS - 2 * KV:
        is_value = head >= HEADS - KV
        kv_head = head - (HEADS - 2 * KV) - tl.where(is_value, KV, 0)
        page = tl.load(table_ptr + tl.load(row_ptr + token) * table_width + position // PAGE).to(tl.int64)
        place = ((page * KV + kv_head) * PAGE + position % PAGE) * E
        cache_ptr += place + tl.where(is_value, value_offset, 0)
        tl.store(cache_ptr + e, x.to(cache_ptr.dtype.element_ty), mask=inside)


def attend(
    heads_BHE: Tensor,
    cache_2pKcE: Tensor,
    table_RP: Tensor,
    row_B: Tensor,
    position_B: Tensor,
    scale: float,
    tuning: Tuning = TUNED,
) -> Tensor:
    """See `paged_attention.PagedAttention.attend`."""
    _, pages, kv_heads, page, head_size = cache_2pKcE.shape
    rows = len(heads_BHE)
    query_heads = heads_BHE.shape[1] - 2 * kv_heads
    group = query_heads // kv_heads
    splits = min(MOST_SPLITS, triton.next_power_of_2(triton.cdiv(tuning.programs, rows * kv_heads)))
    out_BHE = heads_BHE.new_empty(rows, query_heads, head_size)
    # Of each part the mean value, and the logarithm of the weights that it is a mean of.
    parts_BHsE = heads_BHE.new_empty(rows, query_heads, splits, head_size, dtype=torch.float32)
    logs_BHs = heads_BHE.new_empty(rows, query_heads, splits, dtype=torch.float32)
    block_e = triton.next_power_of_2(head_size)
    _attend[(rows, kv_heads, splits)](
        heads_BHE, cache_2pKcE, table_RP, row_B, position_B, out_BHE, parts_BHsE, logs_BHs,
        scale, table_RP.shape[1], pages * kv_heads * page * head_size,
        HEADS=query_heads + 2 * kv_heads, KV=kv_heads, GROUP=group, E=head_size, PAGE=page, SPLITS=splits,
        BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_E=block_e, num_warps=tuning.warps,
        num_stages=min(tuning.stages, max(1, 1024 // (block_e * heads_BHE.element_size()))),
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * query_heads,)](
            parts_BHsE, logs_BHs, out_BHE, E=head_size, SPLITS=splits, BLOCK_E=block_e, num_warps=1
        )
    return out_BHE


@triton.jit
def _attend(
    heads_ptr, cache_ptr, table_ptr, row_ptr, position_ptr, out_ptr, parts_ptr, logs_ptr,
    scale, table_width, value_offset,
    HEADS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    batch, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    table_ptr += tl.load(row_ptr + batch) * table_width
    keys = tl.load(position_ptr + batch) + 1  # its own is among them
    pages = (keys + PAGE - 1) // PAGE
    share = (pages + SPLITS - 1) // SPLITS
    first = split * share
    end = tl.minimum(first + share, pages)

    # The query heads of one key head stand where positions usually stand, so that every key is read once.
    g, e, c = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E), tl.arange(0, PAGE)
    in_group, in_head = g[:, None] < GROUP, e[None, :] < E
    query_ptr = heads_ptr + (batch * HEADS + kv_head * GROUP + g[:, None]) * E + e[None, :]
    query = tl.load(query_ptr, mask=in_group & in_head, other=0.0)
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for number in range(first, end):
        page = tl.load(table_ptr + number).to(tl.int64)
        inside = number * PAGE + c < keys
        place = ((page * KV + kv_head) * PAGE + c[:, None]) * E + e[None, :]
        key = tl.load(cache_ptr + place, mask=inside[:, None] & in_head, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        shrunk = tl.exp(largest - new)
        # Masked too: what is not yet written may be NaN, and NaN times 0 is NaN.
        value = tl.load(cache_ptr + value_offset + place, mask=inside[:, None] & in_head, other=0.0)
        total = total * shrunk + tl.sum(weights, 1)
        sums = sums * shrunk[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        largest = new

    head = batch * (KV * GROUP) + kv_head * GROUP + g
    if SPLITS == 1:
        out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + head[:, None] * E + e[None, :], out, mask=in_group & in_head)
    else:
        # A part without keys has minus infinity, and no weight.
        some = tl.where(total > 0, total, 1.0)
        part = head * SPLITS + split
        tl.store(parts_ptr + part[:, None] * E + e[None, :], sums / some[:, None], mask=in_group & in_head)
        tl.store(logs_ptr + part, largest + tl.log(some), mask=g < GROUP)


@triton.jit
def _combine(parts_ptr, logs_ptr, out_ptr, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, SPLITS), tl.arange(0, BLOCK_E)
    part = head * SPLITS + s
    logs = tl.load(logs_ptr + part)
    weights = tl.exp(logs - tl.max(logs, 0))
    values = tl.load(parts_ptr + part[:, None] * E + e[None, :], mask=e[None, :] < E, other=0.0)
    out = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + head * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


def gated(gate_up_NM: Tensor) -> Tensor:
    """See `paged_attention.gated`."""
    tokens, width = len(gate_up_NM), gate_up_NM.shape[1] // 2
    out_Nm = gate_up_NM.new_empty(tokens, width)
    _gated[(tokens, triton.cdiv(width, GATE_BLOCK))](gate_up_NM, out_Nm, width, BLOCK=GATE_BLOCK, num_warps=4)
    return out_Nm


@triton.jit
def _gated(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    token, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + token * 2 * width + m, mask=m < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * width + width + m, mask=m < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + m, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=m < width)
