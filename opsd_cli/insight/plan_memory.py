"""The peak memory of one rank, in closed form: what a step holds at each of its phases, from the shape of a model and
the settings that decide it. No torch. The one form behind `opsd plan`, the line at a run's start and the tables of
docs/performance.md, where it stands beside what was measured.

Everything is bytes. Letters as in the design: D hidden size, V vocabulary; tokens of the largest micro-batch. What a
layer keeps for its backward pass in fp32 follows from transformers' own forward (a norm keeps its input, the
unit vector and its output; a gated MLP four of its inner widths); in half precision it is fitted to an H100's peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from opsd_cli.insight.plan_case import CUDA, GIB, MIB, Setup, usable

PAGE = 64  # positions of the decoder's cache that are taken at once
FUSED_BYTES, FUSED_PART, CHUNK_PART = 512 * MIB, 64, 64  # as the decoders and the loss take of a card
LEAST_CHUNK = 256 * MIB
BLOCK_BYTES = MIB  # of one fp32 tensor of a block of the loss's rows on a CPU, for each thread
BLOCKS = 8  # such tensors alive at once
CACHE_SHARE = 0.9  # of what is free on a card, that the cache may take (sampling.paged_decoder)
ROOM_TO_DRAW = 0.8  # of what is free on a card, up to which all weights are gathered to draw (engine.placement)
KEPT_INPUTS = 2  # of layers, on a card whose others lie in host memory (train.offload_activations)
REDUCED_AT_ONCE = 4 * 500_000_000  # bytes of gradients that DeepSpeed's stage 0 adds up over ranks in one piece
FOUR_BIT = 0.516  # bytes of a weight in NF4, with its scales
MLP_HALF, NORMS_HALF, ATTENTION_HALF = 3, 8, 2  # widths that a layer holds in half precision, fitted to an H100
PROCESS = 2.5 * MIB  # of a CPU's heap beside tensors: what loading and DeepSpeed leave there in large blocks


@dataclass(frozen=True)
class Phase:
    """What a rank holds at the highest point of a part of a step."""

    name: str  # student, teacher, drawing, update
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """All phases; the peak is the highest of them."""

    phases: tuple[Phase, ...]
    host: Mapping[str, float] = field(default_factory=dict)  # what is in host memory for this rank, on a card

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def memory_of(setup: Setup) -> Memory:
    """The phases of a step, once the optimizer has its moments."""
    held = resting(setup)
    phases = [Phase("student", held | training(setup))]
    if setup.passes:
        phases.append(Phase("teacher", held | scoring(setup)))
    if setup.draws:
        phases.append(Phase("drawing", held | drawing(setup)))
    if setup.bytes == 4 and not setup.offload_optimizer:
        phases.append(Phase("update", held | updating(setup)))
    return Memory(tuple(phases), in_host(setup))


# What stays ----------------------------------------------------------------------------------------------------------


def resting(setup: Setup) -> dict[str, float]:
    """Weights, optimizer and teacher between the phases, and what the decoder keeps."""
    parts = between_phases(setup)
    if setup.card is not None:
        parts["decoder"] = 0 if draws_by_layer(setup) else fused_on_card(setup)
    return parts


def between_phases(setup: Setup) -> dict[str, float]:
    """All of it but the decoder's."""
    shards = setup.ranks if setup.sharding == 3 else 1
    parts = {"weights": weights(setup) / shards, "optimizer": optimizer(setup), "teacher": teacher(setup)}
    if setup.hpz_ranks > 1 and setup.sharding == 3:
        parts["weights"] += weights(setup) / setup.hpz_ranks
    if setup.sharding == 3:
        # Gradients are sums of shards from the start, and the bucket is never given back.
        parts["gradients"] = 0 if setup.offload_optimizer else 4 * setup.learns / setup.ranks
        parts["bucket"] = setup.bucket
    if setup.card is None:
        parts["process"] = PROCESS
    if setup.offload_parameters:
        parts["weights"] = 0
    return parts


def weights(setup: Setup) -> float:
    """Of the model as it is loaded, and of its adapters in its type."""
    if setup.four_bit:
        shape = setup.shape
        return FOUR_BIT * shape.in_layers + 2 * (setup.whole - shape.in_layers) + 2 * setup.trained
    return setup.bytes * (setup.whole + setup.trained)


def optimizer(setup: Setup) -> float:
    """AdamW's two moments, and the fp32 weights that it updates where those of the model are of another type or are
    spread over ranks."""
    if setup.offload_optimizer:
        return 0
    state = 2 if setup.half_states else 4
    masters = state if setup.bytes == 2 or setup.sharding else 0
    return (masters + 2 * state) * setup.learns / (setup.ranks if setup.sharding else 1)


def teacher(setup: Setup) -> float:
    """What it holds beside the student's weights, copies spread as these are."""
    shards = setup.ranks if setup.sharding == 3 else 1
    if setup.teacher == "other" and setup.other is not None:
        return setup.bytes * setup.other.parameters / setup.other_shards if setup.other_shards else 0
    size = {"copy": setup.bytes * setup.learns, "moving": 4 * setup.learns, "update": 4 * setup.shape.in_layers}
    return size.get(setup.teacher, 0) / shards


def in_host(setup: Setup) -> dict[str, float]:
    """What lies in a machine's own memory for this rank."""
    parts: dict[str, float] = {}
    if setup.offload_optimizer:
        parts["optimizer"] = 16 * setup.learns / setup.ranks
    if setup.offload_parameters:
        parts["weights"] = weights(setup) / setup.ranks
    if setup.teacher == "other" and setup.other is not None and not setup.other_shards:
        parts["teacher"] = setup.bytes * setup.other.parameters / setup.ranks
    if setup.offloads:
        aside = max(0, len(setup.shape.layers) - KEPT_INPUTS)
        parts["activations"] = aside * setup.bytes * setup.rows.student * setup.shape.hidden
    return parts


# The student's pass --------------------------------------------------------------------------------------------------


def training(setup: Setup) -> dict[str, float]:
    """At the highest point of a micro-batch's two passes: in the loss, where everything is kept and no gradient of this
    micro-batch is there, or in the backward pass, where layers are computed again."""
    shape, tokens, completion = setup.shape, setup.rows.student, setup.rows.completion
    kept = min(len(shape.layers), KEPT_INPUTS) if setup.offloads else len(shape.layers)
    wide = max(setup.bytes, 4)
    gradients = gradients_before(setup)
    head = wide * shape.vocabulary * shape.hidden if not setup.trained else 0  # added up over the chunks of the loss
    inputs = setup.bytes * tokens * shape.hidden
    states = setup.bytes * completion * shape.hidden * max(1, setup.passes) + 4 * completion * shape.hidden
    gathered = gathered_at_once(setup)
    stored = kept * inputs if setup.checkpoints else len(shape.layers) * layer(setup) * tokens + 3 * inputs
    in_loss = {"gradients": gradients + head, "activations": stored + states, "loss": loss(setup)}
    again = (layer(setup) * tokens if setup.checkpoints else 0) + in_backward(setup)
    with_all = gradients_after(setup)
    in_layers = {
        "gradients": with_all + head,
        "activations": stored + again + (2 * shape.hidden * shape.inner if setup.four_bit else 0),
        "loss": 0.0,
    }
    best = max(in_loss, in_layers, key=lambda parts: sum(parts.values()))
    if gathered:
        best["gathered"] = gathered
    if setup.sharding == 3:
        best["gradients"] += resting(setup)["gradients"]
    elif setup.sharding and setup.ranks > 1:
        best["bucket"] = setup.bucket
    return best


def updating(setup: Setup) -> dict[str, float]:
    """In fp32 DeepSpeed lays gradients into buffers of its own before an update: all of them without sharding, also on
    one rank; those of this rank twice at stages 1 and 2, once at stage 3. In half precision the peak of an H100 has no
    room for that."""
    mine = 4 * setup.learns / (setup.ranks if setup.sharding else 1)
    copies = {0: min(mine, REDUCED_AT_ONCE), 1: 2 * mine, 2: 2 * mine, 3: mine}[setup.sharding]
    bucket = setup.bucket if setup.sharding == 3 else 0
    return {"gradients": mine, "bucket": bucket + copies}


def gradients_before(setup: Setup) -> float:
    """Gradients that are there when a micro-batch begins: those of the one before."""
    if setup.offload_optimizer or setup.sharding == 3:
        return 0
    if setup.bytes == 2:
        return 4 * setup.learns / setup.ranks
    if not setup.rows.several:
        return 0
    return 4 * setup.learns / (setup.ranks if setup.sharding == 2 else 1)


def gradients_after(setup: Setup) -> float:
    """Those at the end of a backward pass, as they come and as they are added up."""
    if setup.offload_optimizer:
        return 2 * setup.learns if setup.bytes == 2 and setup.ranks == 1 else 0
    if setup.sharding == 3:
        return 0
    if setup.bytes == 2:
        coming = 2 * setup.learns if setup.ranks == 1 else 0
        taken = 2 * setup.learns / setup.ranks if setup.half_states else 0
        return 4 * setup.learns / setup.ranks + coming + taken
    return 4 * setup.learns / (setup.ranks if setup.sharding == 2 else 1)


def layer(setup: Setup) -> float:
    """Bytes for each token that one layer keeps between its two passes."""
    shape, tiles = setup.shape, setup.tiles
    mlp = (4 if shape.gated else 2) * shape.inner / tiles
    if setup.bytes == 2:
        fitted = NORMS_HALF * shape.hidden + ATTENTION_HALF * shape.attention + MLP_HALF * shape.inner / tiles
        return 2 * fitted
    norms = (4 if setup.trained else 6) * shape.hidden
    heads = (1 if setup.trained else 2) * (shape.queries + shape.keys) if shape.head_norms else 0
    return 4 * (norms + mlp + 3 * shape.queries + 2 * shape.keys + heads + shape.heads + 7 * setup.lora_rank)


def in_backward(setup: Setup) -> float:
    """What is there for moments in the backward pass of a layer: gradients of the widest part of it, and of its
    largest matrix before it is added."""
    shape = setup.shape
    if setup.bytes == 2:
        return 0  # in what is fitted
    matrix = 0 if setup.trained else shape.hidden * shape.inner
    return 4 * (2 * setup.rows.student * shape.inner / setup.tiles + matrix)


def loss(setup: Setup) -> float:
    """The products of a chunk, and on a CPU what is computed from a block of its rows."""
    shape = setup.shape
    asked = setup.chunk
    if asked is None:
        asked = LEAST_CHUNK if setup.card is None else max(LEAST_CHUNK, int(setup.card * GIB / CHUNK_PART))
    row = (1 + setup.passes) * shape.vocabulary * setup.bytes
    chunk = max(row, min(asked, row * setup.rows.completion))
    if setup.card is not None:
        return max(asked, row)
    rows = min(setup.rows.completion, setup.threads * max(1, BLOCK_BYTES // (4 * shape.vocabulary)))
    return chunk + BLOCKS * 4 * rows * shape.vocabulary


def gathered_at_once(setup: Setup) -> float:
    """At stage 3: the largest module whole, the embeddings or a layer."""
    if setup.sharding != 3 or setup.ranks == 1:
        return 0
    shape = setup.shape
    largest = max(sum(matrix.weights for matrix in one.matrices) + one.other for one in shape.layers)
    return setup.bytes * max(shape.vocabulary * shape.hidden, 2 * largest)


# The other phases ----------------------------------------------------------------------------------------------------


def scoring(setup: Setup) -> dict[str, float]:
    """The teacher's pass: nothing is kept but the states that predict, and what one layer needs for a moment."""
    shape = setup.other if setup.teacher == "other" and setup.other is not None else setup.shape
    moment = 2 * shape.hidden + (2 + shape.gated) * shape.inner / setup.tiles
    states = setup.passes * setup.rows.completion * shape.hidden
    activations = setup.bytes * (setup.rows.teacher * max(moment, 3 * shape.hidden + 2 * shape.attention) + states)
    parts = {"gradients": gradients_before(setup), "activations": activations}
    if setup.teacher == "other" and setup.other is not None and setup.other_shards != 1:
        parts["gathered"] = setup.bytes * max(
            shape.vocabulary * shape.hidden, sum(matrix.weights for matrix in shape.layers[0].matrices)
        )
    elif gathered := gathered_at_once(setup):
        parts["gathered"] = gathered
    if setup.sharding == 3:
        parts["gradients"] += resting(setup)["gradients"]
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


def spreads(setup: Setup) -> bool:
    """Whether a rank's device holds only a part of the weights."""
    return setup.sharding == 3 and (setup.ranks > 1 or setup.offload_parameters)


def draws_by_layer(setup: Setup) -> bool:
    """Whether weights are gathered a layer at a time while completions are drawn, as `engine.placement` decides it."""
    if not spreads(setup) or setup.gather != "auto":
        return spreads(setup) and setup.gather == "layer"
    if setup.card is None:
        return False
    free = setup.card * GIB - CUDA - sum(between_phases(setup).values())
    return weights(setup) > ROOM_TO_DRAW * free


def around_layers(setup: Setup) -> float:
    """Embeddings and head, in the main."""
    shape = setup.shape
    in_layers = shape.in_layers + sum(layer.other for layer in shape.layers)
    return setup.bytes * (setup.whole - in_layers)


def largest_layer(setup: Setup) -> float:
    shape = setup.shape
    largest = max(sum(matrix.weights for matrix in one.matrices) + one.other for one in shape.layers)
    return setup.bytes * (largest + setup.trained / len(shape.layers))


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
