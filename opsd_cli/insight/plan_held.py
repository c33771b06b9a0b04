"""What a rank holds between the phases of a step: weights, optimizer, teacher; on its device and in host memory."""

from __future__ import annotations

from opsd_cli.insight.plan_case import MIB, Setup

FOUR_BIT = 0.516  # bytes of a weight in NF4, with its scales
PROCESS = 2.5 * MIB  # of a CPU's heap beside tensors: what loading and DeepSpeed leave there in large blocks
KEPT_INPUTS = 2  # of layers, on a card whose others lie in host memory (train.offload_activations)


def between_phases(setup: Setup) -> dict[str, float]:
    """All but what the decoder keeps."""
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


def spreads(setup: Setup) -> bool:
    """Whether a rank's device holds only a part of the weights."""
    return setup.sharding == 3 and (setup.ranks > 1 or setup.offload_parameters)


def around_layers(setup: Setup) -> float:
    """Embeddings and head, in the main."""
    shape = setup.shape
    in_layers = shape.in_layers + sum(layer.other for layer in shape.layers)
    return setup.bytes * (setup.whole - in_layers)


def largest_layer(setup: Setup) -> float:
    shape = setup.shape
    largest = max(sum(matrix.weights for matrix in one.matrices) + one.other for one in shape.layers)
    return setup.bytes * (largest + setup.trained / len(shape.layers))
