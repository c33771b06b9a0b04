"""Rows laid one after another instead of padded to a rectangle: the attention that keeps them apart, and the test
whether a model can be run that way. Owns nothing but the layout: every other layer works on single tokens anyway.

Attention is computed for rows of similar length together, so what is padded there is small and short-lived; the
projections, the MLPs and the head, where the time goes, see no padding at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opsd_cli.engine.fused_attention import causal_attention
from opsd_cli.memory import is_out_of_memory

Layout = Literal["packed", "flash", "padded"]
"""packed: one after another, with the attention below; flash: the same, with FlashAttention's own; padded: a rectangle
whose rows are as long as the longest."""

NAME = "opsd_packed"
UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")  # what some models ask of their attention
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}
SHORTEST_SHARE = 0.7  # of the longest row's length: shorter ones form the next group


@dataclass(frozen=True)
class RowGroups:
    """Where rows lie among L tokens: for each group of similar rows the places [b * s] that make it a rectangle, and
    for each token its place in all rectangles, one after another."""

    places: tuple[tuple[Tensor, int], ...]  # places [b * s] among the L tokens, and b
    place_in_groups_L: Tensor


def row_groups(lengths: Sequence[int], device: torch.device) -> RowGroups:
    """Group rows, which lie one after another in the order of `lengths`, by length."""
    length_B = torch.tensor(lengths)
    start_B = length_B.cumsum(0) - length_B
    place_in_groups_L = torch.empty(sum(lengths), dtype=torch.long)
    places: list[Tensor] = []
    groups, offset = similar(lengths), 0
    for rows in groups:
        length_b1, start_b1 = length_B[rows].unsqueeze(1), start_B[rows].unsqueeze(1)
        column_s = torch.arange(int(length_b1.max()))
        is_token_bs = column_s < length_b1
        # Past a row's end its first token is repeated: finite, never looked at by a real one, and dropped afterwards.
        place_bs = start_b1 + column_s.where(is_token_bs, 0)
        place_in_groups_L[place_bs[is_token_bs]] = offset + is_token_bs.flatten().nonzero().squeeze(1)
        places.append(place_bs.flatten())
        offset += place_bs.numel()
    # Made of numbers on the CPU, and moved in one piece.
    whole = torch.cat([*places, place_in_groups_L]).to(device, non_blocking=True)
    *moved, place_in_groups_L = whole.split([*map(len, places), sum(lengths)])
    return RowGroups(tuple(zip(moved, map(len, groups), strict=True)), place_in_groups_L)


def similar(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers in groups whose shortest row has at least SHORTEST_SHARE of the longest one's tokens."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[row] >= SHORTEST_SHARE * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def packed_attention(
    module: nn.Module,
    query_1HLE: Tensor,
    key_1hLE: Tensor,
    value_1hLE: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: RowGroups | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: object,
) -> tuple[Tensor, None]:
    """Causal attention within each row. An implementation for transformers' attention interface: heads H, of keys and
    values h, tokens L, size of a head E. Without `rows` it is ordinary causal attention over a rectangle. Raises
    ValueError for a mask, or anything else that it does not know."""
    asked = [name for name in UNKNOWN if more.get(name) is not None]
    if asked or attention_mask is not None:
        raise ValueError(f"the packed attention does not know {', '.join(asked) or 'masks'}")
    if rows is None:
        out = causal_attention(query_1HLE, key_1hLE, value_1hLE, scale=scaling, dropout=dropout)
        return out.transpose(1, 2), None
    flat = [tensor[0].transpose(0, 1) for tensor in (query_1HLE, key_1hLE, value_1hLE)]
    outs = []
    for place_bs, count in rows.places:
        # [b * s, H, E] -> [b, H, s, E]
        group = [part.index_select(0, place_bs).unflatten(0, (count, -1)).transpose(1, 2) for part in flat]
        out_bHsE = causal_attention(*group, scale=scaling, dropout=dropout)
        outs.append(out_bHsE.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, rows.place_in_groups_L).unsqueeze(0), None


def usable_layout(causal: PreTrainedModel) -> Layout:
    """How this model can run rows one after another; sets its attention accordingly. A short batch is run both ways:
    where the hidden states differ, or the model has layers that this attention does not know, rows are padded."""
    attention = causal.config._attn_implementation
    layout: Layout = "flash" if attention.startswith("flash") else "packed"
    device = causal.get_input_embeddings().weight.device
    if layout == "flash" and device.type == "cpu":
        return "padded"  # it cannot be tried there
    if layout == "packed":
        kinds = set(causal.config.to_dict().get("layer_types") or ["full_attention"])
        if attention != "sdpa" or kinds != {"full_attention"}:
            return "padded"
    lengths = (7, 4, 2)
    ids_L = torch.arange(sum(lengths), device=device) % causal.config.vocab_size
    with torch.no_grad():
        expected_LD = run_rows(causal.get_decoder(), ids_L, lengths, layout="padded")
        try:
            if layout == "packed":
                AttentionInterface.register(NAME, packed_attention)
                causal.set_attn_implementation(NAME)
            found_LD = run_rows(causal.get_decoder(), ids_L, lengths, layout=layout)
        except (TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            found_LD = torch.full_like(expected_LD, torch.nan)
    tolerance = TOLERANCE[expected_LD.dtype] * float(expected_LD.abs().max())
    if float((found_LD - expected_LD).abs().max()) <= tolerance:
        return layout
    causal.set_attn_implementation(attention)
    return "padded"


def run_rows(decoder: nn.Module, input_ids_L: Tensor, lengths: Sequence[int], *, layout: Layout) -> Tensor:
    """Hidden states [L, D] of rows that lie one after another. Rows padded on the right need no mask: under causal
    attention a real token never looks at padding."""
    if layout == "padded":
        ids_BS = nn.utils.rnn.pad_sequence(input_ids_L.split(list(lengths)), batch_first=True)
        hidden_BSD = decoder(input_ids=ids_BS, use_cache=False).last_hidden_state
        starts = range(0, ids_BS.numel(), ids_BS.shape[1])
        place_L = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        return hidden_BSD.flatten(0, 1).index_select(0, place_L.to(ids_BS.device, non_blocking=True))
    position_L = torch.cat([torch.arange(length) for length in lengths]).to(input_ids_L.device, non_blocking=True)
    more = {"rows": row_groups(lengths, input_ids_L.device)} if layout == "packed" else {}
    return decoder(
        input_ids=input_ids_L.unsqueeze(0), position_ids=position_L.unsqueeze(0), use_cache=False, **more
    ).last_hidden_state.squeeze(0)
