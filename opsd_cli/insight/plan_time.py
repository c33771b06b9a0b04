"""How long a step takes, in closed form: arithmetic over what a card does of its peak, bytes over its bandwidth, and
what ZeRO sends over links. A small model of the hardware: its constants were measured on one H100, or for a CPU on one
core (docs/performance.md); other cards are taken to reach the same shares of their peaks, links 0.8 of theirs.

Seconds. For orders of magnitude and for what grows with what: not a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opsd_cli.insight.plan_case import Setup
from opsd_cli.insight.plan_drawing import cached, draws_by_layer, rows_at_once
from opsd_cli.insight.plan_held import around_layers, weights
from opsd_cli.settings.known_devices import Card, Cluster, Precision

SCORED = 0.5  # of the peak, in passes without gradient: teacher 553 TFLOP/s, prefill 451 of 989
TRAINED = 0.29  # in passes with gradient under LoRA: 287 of 989
LOST = 0.55  # in the loss: 1.3 times its products, which reach 735 of 989
BANDWIDTH = 0.82  # of a card's memory, while a token is drawn
LAYER_SECONDS, ADAPTER_SECONDS = 36e-6, 19e-6  # of a layer in a drawn token, and of its adapters, beside its bytes
LINKS = 0.8  # of a link's rate; not measured
UPDATE_BYTES = 30  # read and written of a trained weight in an update
CPU_FLOPS = 54e9  # of a thread, in a matrix product (AVX2, docs/performance.md)
CPU_SCORED, CPU_TRAINED, CPU_DRAWN = 0.6, 0.8, 0.2  # of it
PCIE = 25e9  # bytes a second between host and card, for what is offloaded; not measured


@dataclass(frozen=True)
class Work:
    """What one rank does in a step, in tokens of all its micro-batches."""

    student: int
    teacher: int
    completion: int
    rows: int  # completions that are drawn
    longest: int  # tokens of one
    prompts: int  # tokens of prompts that are prefilled
    micro_batches: int


@dataclass(frozen=True)
class Hardware:
    """What the ranks run on."""

    card: Card | None  # None: CPU cores
    precision: Precision
    threads: int = 1
    cluster: Cluster | None = None

    def flops(self, share: float, cpu_share: float) -> float:
        if self.card is None:
            return cpu_share * CPU_FLOPS * self.threads
        return share * (self.card.tflops(self.precision) or self.card.float32_tflops) * 1e12

    def link(self, ranks: int) -> float:
        """Bytes a second of one rank to its neighbour in a ring of all; 0 where there is no figure."""
        if self.card is None:
            return 0.0
        inside = self.cluster.cards if self.cluster is not None else 8
        if ranks <= inside:
            return LINKS * self.card.link_gb_s * 1e9
        return LINKS * self.cluster.network_gb_s * 1e9 if self.cluster is not None else 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by phase; `links` None where the network between machines is not known."""

    drawing: float
    teacher: float
    student: float
    update: float
    links: float | None

    @property
    def total(self) -> float:
        return self.drawing + self.teacher + self.student + self.update + (self.links or 0.0)


def step_time(setup: Setup, work: Work, hardware: Hardware) -> StepTime:
    """Of one rank, all ranks being alike."""
    shape = setup.shape
    other = setup.other if setup.teacher == "other" and setup.other is not None else shape
    # Forwards, backwards towards the inputs, towards the weights, and once more forwards to compute layers again.
    passes = 2 + (1 if not setup.trained else 0) + (1 if setup.checkpoints else 0)
    student = passes * 2 * shape.active * work.student / hardware.flops(TRAINED, CPU_TRAINED)
    products = 1 + setup.passes + (1 if setup.trained else 2)
    loss = products * 2 * shape.vocabulary * shape.hidden * work.completion / hardware.flops(LOST, CPU_TRAINED)
    teacher = setup.passes * 2 * other.active * work.teacher / hardware.flops(SCORED, CPU_SCORED)
    return StepTime(
        drawing=drawing_time(setup, work, hardware),
        teacher=teacher,
        student=student + loss,
        update=update_time(setup, hardware),
        links=link_time(setup, work, hardware),
    )


def drawing_time(setup: Setup, work: Work, hardware: Hardware) -> float:
    """A prefill of the prompts, then a token of every row at a time, as often as the cache must be filled."""
    if not setup.draws:
        return 0.0
    shape, at_once = setup.shape, rows_at_once(setup)
    prefill = 2 * shape.active * work.prompts / hardware.flops(SCORED, CPU_SCORED)
    tokens = tokens_in_turn(setup, work)
    head = shape.vocabulary * shape.hidden
    if hardware.card is None:
        one = 2 * (shape.active + head) * min(work.rows, at_once) / (CPU_DRAWN * CPU_FLOPS * hardware.threads)
        return prefill + tokens * one
    rate = BANDWIDTH * hardware.card.memory_gb_s * 1e9
    cache = min(work.rows, at_once) * (setup.rows.prompt + work.longest / 2) * cached(setup)
    read = (weights(setup) - (0 if shape.tied else setup.bytes * head) + cache) / rate
    launches = len(shape.layers) * (LAYER_SECONDS + (ADAPTER_SECONDS if setup.trained else 0))
    return prefill + tokens * (launches + read)


def tokens_in_turn(setup: Setup, work: Work) -> int:
    """Tokens that are drawn one after another, each for all rows that the cache has room for."""
    return work.longest * -(-work.rows // max(1, rows_at_once(setup)))


def update_time(setup: Setup, hardware: Hardware) -> float:
    """AdamW over the weights that this rank updates."""
    mine = setup.learns / (setup.ranks if setup.sharding else 1)
    if hardware.card is None:
        return mine * 12 / (CPU_DRAWN * CPU_FLOPS * hardware.threads)
    if setup.offload_optimizer:
        return mine * (UPDATE_BYTES / 50e9 + 6 / PCIE)  # at 50 GB/s of host memory
    return mine * UPDATE_BYTES / (BANDWIDTH * hardware.card.memory_gb_s * 1e9)


def link_time(setup: Setup, work: Work, hardware: Hardware) -> float | None:
    """What a rank sends in a step, over the rate of its slowest link; nothing overlaps."""
    streamed = gathered_in_turn(setup, work) / PCIE if setup.offload_parameters and hardware.card is not None else 0.0
    if setup.ranks == 1:
        return streamed
    rate = hardware.link(setup.ranks)
    if not rate:
        return None
    return streamed + sent(setup, work) / rate


def gathered_in_turn(setup: Setup, work: Work) -> float:
    """Bytes that are gathered in a step where layers are gathered for every token; 0 where they are not."""
    if not setup.draws or not draws_by_layer(setup):
        return 0
    return tokens_in_turn(setup, work) * (weights(setup) - around_layers(setup))


def sent(setup: Setup, work: Work) -> float:
    """Bytes that a rank sends in a step. Gradients go in fp32, weights in their own type."""
    share, micro_batches = (setup.ranks - 1) / setup.ranks, work.micro_batches
    gradients, whole = 4 * setup.learns, weights(setup)
    if setup.sharding == 0:
        return 2 * share * gradients
    if setup.sharding == 1:
        return share * (2 * gradients + setup.bytes * setup.learns)
    if setup.sharding == 2:
        return share * (micro_batches * gradients + setup.bytes * setup.learns)
    # All weights for each pass of a micro-batch (teacher, forwards, backwards) and once for drawing.
    teacher = 1 if setup.passes and setup.teacher != "other" else 0
    drawn = gathered_in_turn(setup, work) or (whole if setup.draws else 0)
    return share * (micro_batches * (gradients + (2 + teacher) * whole) + drawn)


def with_ranks(setup: Setup, ranks: int, stage: int) -> Setup:
    """The same rows on each rank, on another number of ranks."""
    return replace(setup, ranks=ranks, stage=stage)
