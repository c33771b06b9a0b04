"""What a rank holds while completions are drawn: cache, copies of projections, what is gathered of sharded weights."""

from __future__ import annotations

from opsd_cli.insight.plan_case import CUDA, GIB, MIB, Setup, usable
from opsd_cli.insight.plan_held import around_layers, between_phases, largest_layer, spreads, weights

PAGE = 64  # positions of the decoder's cache that are taken at once
FUSED_BYTES, FUSED_PART = 512 * MIB, 64  # as the decoders take of a card
CACHE_SHARE = 0.9  # of what is free on a card, that the cache may take (sampling.paged_decoder)
ROOM_TO_DRAW = 0.8  # of what is free on a card, up to which all weights are gathered to draw (engine.placement)


def resting(setup: Setup) -> dict[str, float]:
    """Weights, optimizer and teacher between the phases, and what the decoder keeps."""
    parts = between_phases(setup)
    if setup.card is not None:
        parts["decoder"] = 0 if draws_by_layer(setup) else fused_on_card(setup)
    return parts


def drawing(setup: Setup) -> dict[str, float]:
    """Completions: the cache, copies of projections side by side, and what a prefill or a draw takes."""
    shape, rows = setup.shape, setup.rows
    parts: dict[str, float] = {"cache": rows_at_once(setup) * row_in_cache(setup)}
    if setup.card is None:
        parts["decoder"] = 0 if draws_by_layer(setup) else fused_on_cpu(setup)
        prefill = rows.drawn * rows.prompt * (3 * shape.hidden + 2 * shape.attention + 2 * shape.inner)
        draw = 6 * rows.drawn * shape.vocabulary
        parts["activations"] = 4 * max(prefill, draw)
    if gathered := gathered_to_draw(setup):
        parts["gathered"] = gathered
    return parts


def gathered_to_draw(setup: Setup) -> float:
    """At stage 3: all weights, or what is around the layers and one of these."""
    if not spreads(setup):
        return 0
    return around_layers(setup) + largest_layer(setup) if draws_by_layer(setup) else weights(setup)


def draws_by_layer(setup: Setup) -> bool:
    """Whether weights are gathered a layer at a time while completions are drawn, as `engine.placement` decides it."""
    if not spreads(setup) or setup.gather != "auto":
        return spreads(setup) and setup.gather == "layer"
    if setup.card is None:
        return False
    free = setup.card * GIB - CUDA - sum(between_phases(setup).values())
    return weights(setup) > ROOM_TO_DRAW * free


def rows_at_once(setup: Setup) -> int:
    """Rows that are drawn together: on a card as many as what is free has room for."""
    if setup.card is None or not setup.draws:
        return setup.rows.drawn
    held = sum(resting(setup).values()) + gathered_to_draw(setup)
    free = min(CACHE_SHARE * (setup.card * GIB - CUDA - held), usable(setup.card) - held)
    return max(1, min(setup.rows.drawn, int(free / row_in_cache(setup))))


def row_in_cache(setup: Setup) -> float:
    """Bytes of one row in the key-value cache."""
    rows = setup.rows
    columns = -(-(rows.prompt + rows.longest) // PAGE) * PAGE
    if setup.card is None:
        columns = -(-(rows.prompt + min(rows.longest, 256)) // 8) * 8
    return columns * cached(setup)


def cached(setup: Setup) -> float:
    """Bytes of a token in the key-value cache."""
    return setup.bytes * len(setup.shape.layers) * 2 * setup.shape.keys


def fused_on_card(setup: Setup) -> float:
    """Projections that a GPU's decoder keeps side by side; it does not know quantised ones."""
    shape = setup.shape
    copies = setup.bytes * len(shape.layers) * shape.hidden * shape.attention
    most = min(FUSED_BYTES, (setup.card or 0) * GIB / FUSED_PART)
    return 0 if setup.four_bit or not setup.draws or copies > most else copies


def fused_on_cpu(setup: Setup) -> float:
    """The same on a CPU, where adapters are merged into the copies, and each matrix that has one is copied."""
    shape = setup.shape
    if shape.kind not in ("llama", "mistral", "qwen2", "qwen3"):
        return 0
    several = shape.hidden * (shape.attention + 2 * shape.inner)  # of one layer: those that read the same input
    single = shape.hidden * (shape.queries + shape.inner) if setup.trained else 0
    copies = setup.bytes * len(shape.layers) * (several + single)
    return copies if copies <= FUSED_BYTES else 0
