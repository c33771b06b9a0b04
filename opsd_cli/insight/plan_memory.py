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

from opsd_cli.insight.plan_case import GIB, MIB, Setup
from opsd_cli.insight.plan_drawing import drawing, resting
from opsd_cli.insight.plan_held import KEPT_INPUTS, in_host, weights

CHUNK_PART = 64  # one part in so many of a card, that the loss takes at a time
LEAST_CHUNK = 256 * MIB
BLOCK_BYTES = MIB  # of one fp32 tensor of a block of the loss's rows on a CPU, for each thread
BLOCKS = 8  # such tensors alive at once
REDUCED_AT_ONCE = 4 * 500_000_000  # bytes of gradients that DeepSpeed's stage 0 adds up over ranks in one piece
LIVE_PARAMETERS = 10**9  # that DeepSpeed's stage 3 gathers at most (stage3_max_live_parameters)
IN_FLIGHT, IN_FLIGHT_PART = 4, 0.6  # buckets, and part of what is gathered: fitted to 100 M parameters on two ranks
MLP_HALF, NORMS_HALF, ATTENTION_HALF = 3, 8, 2  # widths that a layer holds in half precision, fitted to an H100


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


# The student's pass --------------------------------------------------------------------------------------------------


def training(setup: Setup) -> dict[str, float]:
    """At the highest point of a micro-batch's two passes: in the loss, where everything is kept and no gradient of this
    micro-batch is there, in the backward pass, where layers are computed again, or at stage 3 before the loss."""
    shape, tokens, completion = setup.shape, setup.rows.student, setup.rows.completion
    kept = min(len(shape.layers), KEPT_INPUTS) if setup.offloads else len(shape.layers)
    wide = max(setup.bytes, 4)
    gradients = gradients_before(setup)
    head = wide * shape.vocabulary * shape.hidden if not setup.trained else 0  # added up over the chunks of the loss
    inputs = setup.bytes * tokens * shape.hidden
    states = setup.bytes * completion * shape.hidden * max(1, setup.passes) + 4 * completion * shape.hidden
    stored = kept * inputs if setup.checkpoints else len(shape.layers) * layer(setup) * tokens + 3 * inputs
    in_loss = {"gradients": gradients + head, "activations": stored + states, "loss": loss(setup)}
    again = (layer(setup) * tokens if setup.checkpoints else 0) + in_backward(setup)
    with_all = gradients_after(setup)
    in_layers = {
        "gradients": with_all + head,
        "activations": stored + again + (2 * shape.hidden * shape.inner if setup.four_bit else 0),
        "loss": 0.0,
    }
    if gathered := gathered_at_once(setup):
        in_loss["gathered"] = in_layers["gathered"] = gathered
    forwards = {"gradients": gradients, "activations": stored + states, "loss": 0.0, "gathered": gathered_ahead(setup)}
    best = max(in_loss, in_layers, forwards, key=lambda parts: sum(parts.values()))
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


def gathered_ahead(setup: Setup) -> float:
    """At stage 3, in the forwards of a pass with gradient: DeepSpeed fetches a bucket ahead at the call of each module,
    however small, and so gathers as much as it may, and has some buckets twice for a moment."""
    at_once = gathered_at_once(setup)
    if not at_once:
        return 0
    live = min(weights(setup), setup.bytes * LIVE_PARAMETERS)
    return max(at_once, live + min(IN_FLIGHT * setup.bucket, IN_FLIGHT_PART * live))


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
