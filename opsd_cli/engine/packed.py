"""Rows laid one after another instead of padded to a rectangle: the attention that keeps them apart, and the check
whether a model can be run that way.

On a GPU torch has a kernel for rows of any lengths. Elsewhere attention runs on rows of similar length together, so
what is padded there is small and short-lived; projections, MLPs and the head work on single tokens, and where the time
goes there is no padding at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opsd_cli.data.pairing import upload, whole_rows
from opsd_cli.engine.agreement import describe, deviation, isolation_limit, model_limit, probe_rows
from opsd_cli.engine.fused_attention import HALF, causal_attention, rows_attention
from opsd_cli.engine.loaded_weights import has_dropout
from opsd_cli.engine.loading import text_settings
from opsd_cli.engine.process_group import Ranks
from opsd_cli.settings.memory_errors import is_out_of_memory

Layout = Literal["varlen", "packed", "flash", "padded"]
"""varlen: one after another, with torch's kernel for rows of any lengths; packed: the same, with attention over groups
of similar length; flash: the same, with the flash-attn package's own; padded: a rectangle whose rows are as long as the
longest."""

SHARING: tuple[Layout, ...] = ("packed", "varlen")  # in which rows can share a prompt
NAME = "opsd_packed"
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")  # what some models ask of their attention
SHORTEST_SHARE = 0.7  # of the longest row's length: shorter ones form the next group


@dataclass(frozen=True)
class RowBounds:
    """Where rows begin and end among their tokens. With `whole`, the places of these among the L of a batch that shares
    prompts, and the way back."""

    bounds: Tensor  # int32 [B + 1]: each row's first token, and the number of all
    longest: int
    whole: tuple[Tensor, Tensor] | None = None


def row_bounds(lengths: Sequence[int], device: torch.device, *, shared: Sequence[int] = ()) -> RowBounds:
    ends_B = torch.tensor(lengths).cumsum(0)
    bounds = upload(nn.functional.pad(ends_B, (1, 0)).int(), device)
    if not shared:
        return RowBounds(bounds, max(lengths))
    places_W, back_L = whole_rows(lengths, shared)
    return RowBounds(bounds, max(lengths), (upload(places_W, device), upload(back_L, device)))


@dataclass(frozen=True)
class RowGroups:
    """Where rows lie among L tokens, in both directions."""

    places: tuple[tuple[Tensor, int], ...]  # of each group: places [b * s] among the L tokens, and its rows b
    place_in_groups_L: Tensor  # of each token, in all rectangles [b * s] laid one after another


def row_groups(lengths: Sequence[int], device: torch.device, *, shared: Sequence[int] = ()) -> RowGroups:
    """Group rows, which lie one after another in the order of `lengths` and may share prompts (`TokenBatch`), by
    length."""
    length_B = torch.tensor(lengths)
    start_B = length_B.cumsum(0) - length_B
    place_in_groups_L = torch.empty(sum(lengths), dtype=torch.long)
    places: list[Tensor] = []
    groups, offset = group_similar(lengths), 0
    for rows in groups:
        # A rectangle [b, s] of places: row starts plus columns, as long as the group's longest row.
        length_b1, start_b1 = length_B[rows].unsqueeze(1), start_B[rows].unsqueeze(1)
        column_s = torch.arange(int(length_b1.max()))
        is_token_bs = column_s < length_b1
        # Past a row's end its first token is repeated: finite, never seen by a real token, and dropped afterwards.
        place_bs = start_b1 + column_s.where(is_token_bs, 0)
        # The way back: the cell of the rectangle that a token was copied to. Repeated tokens have no way back.
        place_in_groups_L[place_bs[is_token_bs]] = offset + is_token_bs.flatten().nonzero().squeeze(1)
        places.append(place_bs.flatten())
        offset += place_bs.numel()
    if shared:
        # So far of whole rows. Each row has the keys of a shared prompt; what comes out is that of the first.
        places_W, back_L = whole_rows(lengths, shared)
        places, place_in_groups_L = [places_W[place_bs] for place_bs in places], place_in_groups_L[back_L]
    # Computed on the CPU, where the lengths are, and moved in one copy: a copy per group would cost more than it moves.
    places_on_device = upload(torch.cat([*places, place_in_groups_L]), device)
    *places, place_in_groups_L = places_on_device.split([*map(len, places), len(place_in_groups_L)])
    return RowGroups(tuple(zip(places, map(len, groups), strict=True)), place_in_groups_L)


def group_similar(lengths: Sequence[int]) -> list[list[int]]:
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
    rows: RowGroups | RowBounds | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: object,
) -> tuple[Tensor, None]:
    """Causal attention within each row. An implementation for transformers' attention interface: heads H, of keys and
    values h, tokens L, size of a head E. Without `rows` it is ordinary causal attention over a rectangle. Raises
    ValueError for a mask, or anything else that it does not support."""
    unsupported = [name for name in UNSUPPORTED if options.get(name) is not None]
    if unsupported or attention_mask is not None:
        raise ValueError(f"the packed attention does not support {', '.join(unsupported) or 'masks'}")
    if rows is None:
        out = causal_attention(query_1HLE, key_1hLE, value_1hLE, scale=scaling, dropout=dropout)
        return out.transpose(1, 2), None
    by_token = [tensor[0].transpose(0, 1) for tensor in (query_1HLE, key_1hLE, value_1hLE)]  # [L, heads, E]
    if isinstance(rows, RowBounds):
        assert not dropout, "refused by why_not"
        if rows.whole is None:
            return rows_attention(*by_token, rows.bounds, longest=rows.longest, scale=scaling).unsqueeze(0), None
        places_W, back_L = rows.whole
        by_token = [tensor.index_select(0, places_W) for tensor in by_token]
        out_WHE = rows_attention(*by_token, rows.bounds, longest=rows.longest, scale=scaling)
        return out_WHE.index_select(0, back_L).unsqueeze(0), None
    outputs = []
    for place_bs, count in rows.places:
        # [b * s, heads, E] -> [b, heads, s, E]
        group = [tensor.index_select(0, place_bs).unflatten(0, (count, -1)).transpose(1, 2) for tensor in by_token]
        out_bHsE = causal_attention(*group, scale=scaling, dropout=dropout)
        outputs.append(out_bHsE.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, rows.place_in_groups_L).unsqueeze(0), None


@dataclass(frozen=True)
class LayoutChoice:
    """How rows are run, and where that is not the first choice, why."""

    layout: Layout
    reason: str = ""
    unshared: str = ""  # why rows cannot share a prompt, where they are packed


def usable_layout(
    causal: PreTrainedModel, ranks: Ranks, *, also: Callable[[Layout], str] = lambda layout: ""
) -> LayoutChoice:
    """How all ranks run rows; sets this model's attention accordingly. `also` may refuse a layout. Collective.

    Each rank runs a few rows both ways on its own device. Every rank plans the micro-batches of all by the layout, so
    they must have the same one: where the two ways disagree on any rank, rows are padded on all.
    """
    attention = causal.config._attn_implementation
    refusal = ""
    for layout in layouts_to_try(causal):
        refused = ranks.refusal(why_not(causal, layout) or also(layout))
        if not refused:
            unshared = ranks.refusal(why_not_shared(causal, layout)) if layout in SHARING else ""
            return LayoutChoice(layout, refusal, unshared)
        refusal = refused
        if causal.config._attn_implementation != attention:
            causal.set_attn_implementation(attention)
    return LayoutChoice("padded", refusal)


def layouts_to_try(causal: PreTrainedModel) -> tuple[Layout, ...]:
    """The best first; the same on every rank, which all have one kind of device and one number format."""
    if causal.config._attn_implementation.startswith("flash"):
        return ("flash",)
    weight = causal.get_input_embeddings().weight
    return ("varlen", "packed") if weight.device.type == "cuda" and weight.dtype in HALF else ("packed",)


def why_not(causal: PreTrainedModel, layout: Layout) -> str:
    """Why this rank cannot run rows in that layout; empty, and the attention is set for it, where it can."""
    attention = causal.config._attn_implementation
    if layout == "flash" and causal.get_input_embeddings().weight.device.type == "cpu":
        return "flash attention runs on GPUs only, and the model is on the CPU when it is tried"
    if layout == "varlen" and has_dropout(causal):
        return "torch's kernel for rows of any lengths has no dropout, and the model has (model.dropout=true)"
    if layout in ("packed", "varlen"):
        if attention != "sdpa":
            return f"model.attention={attention} can only be padded; sdpa and flash_attention_2 can be packed"
        kinds = set(text_settings(causal.config).get("layer_types") or ["full_attention"]) - {"full_attention"}
        if kinds:
            return f"the model has layers of {', '.join(sorted(kinds))}; only full_attention can be packed"
    return find_disagreement(causal, layout)


def find_disagreement(causal: PreTrainedModel, layout: Layout) -> str:
    """What is wrong when a few rows are run in that layout, in words; empty where nothing is.

    Two things must hold. The logits are those of padded rows, within rounding. And a row's logits do not depend on what
    the rows beside it hold: rounding does not blur that, because with equal shapes they must be equal to the last bit.
    """
    rows = probe_rows(causal)
    # Every second row keeps its tokens; the others change, and the kept ones must not notice.
    vocabulary = len(causal.get_input_embeddings().weight)
    is_same_L = torch.cat([torch.full_like(row, number % 2, dtype=torch.bool) for number, row in enumerate(rows)])
    others = [row if number % 2 else (row + 1) % vocabulary for number, row in enumerate(rows)]
    with torch.no_grad():
        padded_LV = logits_of(causal, rows, layout="padded")
        alone_LV = torch.cat([logits_of(causal, [row], layout="padded") for row in rows])
        beside_others_LV = logits_of(causal, others, layout="padded")
        try:
            if layout != "flash":
                AttentionInterface.register(NAME, packed_attention)
                causal.set_attn_implementation(NAME)
            packed_LV = logits_of(causal, rows, layout=layout)
            packed_beside_others_LV = logits_of(causal, others, layout=layout)
        except (TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            first_line = str(error).strip().partition("\n")[0]
            return f"the model cannot be run with packed rows ({type(error).__name__}: {first_line})"
    worst = deviation(packed_LV, padded_LV).max()
    limit = model_limit(deviation(alone_LV, padded_LV).max(), causal.dtype)
    # Not `>`, here and below: a deviation that is NaN must fail too.
    if not worst <= limit:
        return f"logits of packed rows deviate from those of padded rows {describe(worst, limit)}"
    worst = deviation(packed_beside_others_LV, packed_LV)[is_same_L].max()
    limit = isolation_limit(deviation(beside_others_LV, padded_LV)[is_same_L].max(), causal.dtype)
    if worst <= limit:
        return ""
    return f"packed rows see each other: their logits change {describe(worst, limit)}"


@torch.no_grad()
def why_not_shared(causal: PreTrainedModel, layout: Layout) -> str:
    """What is wrong when rows share a prompt that is run once, in words; empty where nothing is."""
    longest, *others = sorted(probe_rows(causal), key=len, reverse=True)
    common = len(longest) // 2
    rows = [longest, *(torch.cat([longest[:common], row]) for row in others)]
    lengths, shared = [len(row) for row in rows], [0, *(common for _ in others)]
    own_WV = logits_of(causal, rows, layout=layout)
    alone_WV = torch.cat([logits_of(causal, [row], layout=layout) for row in rows])
    _, back_L = whole_rows(lengths, shared)
    back_L = upload(back_L, own_WV.device)
    hidden_LD = run_rows(causal.get_decoder(), torch.cat(rows)[back_L], lengths, layout=layout, shared=shared)
    worst = deviation(causal.get_output_embeddings()(hidden_LD), own_WV[back_L]).max()
    limit = model_limit(deviation(alone_WV, own_WV).max(), causal.dtype)
    if worst <= limit:  # not `>`, or NaN would pass
        return ""
    return f"logits of rows that share a prompt deviate from those of rows with their own {describe(worst, limit)}"


def logits_of(causal: PreTrainedModel, rows: Sequence[Tensor], *, layout: Layout) -> Tensor:
    """The output head's product [L, V] for rows that are run together, before any scale or cap."""
    hidden_LD = run_rows(causal.get_decoder(), torch.cat(list(rows)), [len(row) for row in rows], layout=layout)
    return causal.get_output_embeddings()(hidden_LD)


def run_rows(
    decoder: nn.Module, input_ids_L: Tensor, lengths: Sequence[int], *, layout: Layout, shared: Sequence[int] = ()
) -> Tensor:
    """Hidden states [L, D] of rows that lie one after another and may share prompts (`TokenBatch`), in a layout of
    SHARING."""
    assert layout in SHARING or not shared, "run_whole_rows does that"
    if layout == "padded":
        # Padded on the right, no mask is needed: under causal attention a real token never looks at padding.
        ids_BS = nn.utils.rnn.pad_sequence(input_ids_L.split(list(lengths)), batch_first=True)
        hidden_BSD = decoder(input_ids=ids_BS, use_cache=False).last_hidden_state
        starts = range(0, ids_BS.numel(), ids_BS.shape[1])
        place_L = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        return hidden_BSD.flatten(0, 1).index_select(0, upload(place_L, ids_BS.device))
    # Positions restart at 0 in each row. The flash-attn package finds the rows by that; our attention is given them.
    firsts = shared or (0,) * len(lengths)
    position_L = torch.cat([torch.arange(first, length) for first, length in zip(firsts, lengths, strict=True)])
    position_L = upload(position_L, input_ids_L.device)
    lay_out = {"packed": row_groups, "varlen": row_bounds}
    rows = {"rows": lay_out[layout](lengths, input_ids_L.device, shared=shared)} if layout in lay_out else {}
    return decoder(
        input_ids=input_ids_L.unsqueeze(0), position_ids=position_L.unsqueeze(0), use_cache=False, **rows
    ).last_hidden_state.squeeze(0)


def run_whole_rows(
    decoder: nn.Module, input_ids_L: Tensor, lengths: Sequence[int], *, layout: Layout, shared: Sequence[int]
) -> Tensor:
    """The same where rows cannot share: each is run with a prompt of its own."""
    places_W, back_L = (upload(places, input_ids_L.device) for places in whole_rows(lengths, shared))
    hidden_WD = run_rows(decoder, input_ids_L.index_select(0, places_W), lengths, layout=layout)
    return hidden_WD.index_select(0, back_L)
