"""What `opsd plan` says of a recipe before anything is loaded: memory and time on a device, whether it fits, what to
change, the same with a second model as teacher, and how it grows with ranks. No torch; the forms are in `plan_memory`
and `plan_time`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opsd_cli.insight.model_lookup import FoundModel, find_model
from opsd_cli.insight.model_shape import Shape
from opsd_cli.insight.plan_case import GIB, Setup
from opsd_cli.insight.plan_drawing import draws_by_layer, rows_at_once
from opsd_cli.insight.plan_held import around_layers, spreads, weights
from opsd_cli.insight.plan_memory import Memory, memory_of
from opsd_cli.insight.plan_setup import (
    Device,
    Lengths,
    hardware_of,
    precision_of,
    room_of,
    row_lengths,
    setup_of,
    with_rows,
)
from opsd_cli.insight.plan_time import StepTime, Work, step_time, with_ranks
from opsd_cli.settings.config import Config
from opsd_cli.settings.known_devices import Precision

TEACHERS = (1, 2, 4)  # times the student's weights, of distillation from a second model
RANKS = tuple(2**power for power in range(11))
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Plan:
    """A recipe on a device."""

    model: FoundModel
    device: Device
    precision: Precision
    setup: Setup
    work: Work
    memory: Memory
    room: float  # bytes of a rank's device that may be used
    time: StepTime | None  # None: no rates are known of this device
    steps: int
    lengths: tuple[int, int, int]  # of a row: student's prompt, teacher's prompt, completion
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.peak.total <= self.room

    @property
    def row(self) -> int:
        """Tokens of the longest row."""
        prompt, teacher, completion = self.lengths
        return max(prompt, teacher if self.setup.passes else 0) + completion


def make_plan(
    config: Config, device: Device, *, ranks: int, lengths: Lengths, threads: int = 1, model: FoundModel | None = None
) -> Plan:
    """The plan of a checked config. Raises DataError for a model whose size cannot be told, OutsideError where its
    config.json cannot be had."""
    model = model or find_model(config.model.path, config.model.revision)
    teacher: Any = config.teacher
    other = find_model(teacher.path, teacher.revision).shape if teacher.plugin_name == "external" else None
    sizes, notes = row_lengths(config, lengths), list[str]()
    setup = setup_of(config, model.shape, device, ranks=ranks, other=other, threads=threads)
    setup, work = with_rows(config, setup, sizes, tokens=config.train.micro_batch_tokens)
    if lengths.prompt is None:
        notes.append(
            f"prompts are taken as long as the recipe allows (prompts.max_tokens={config.prompts.max_tokens}); give "
            "--prompt-tokens and --teacher-prompt-tokens for yours"
        )
    at_once = rows_at_once(setup)
    if at_once < setup.rows.drawn:
        notes.append(
            f"the key-value cache has room for {at_once} of {setup.rows.drawn} rows at once, so drawing takes longer"
        )
    room = room_of(device, ranks=ranks)
    notes += larger_than_card(setup, device, room, draws=setup.draws or config.eval.problems != 0)
    if config.sampler.plugin_name == "vllm":
        notes += vllm_beside(config.sampler, setup, device)
    if not model.shape.known:
        notes.append(
            f"{model.shape.kind}: weights are counted from the files, activations are estimated as those of a Llama "
            "with the same matrices"
        )
    precision = precision_of(config, device)
    hardware = hardware_of(setup, device, precision)
    time = step_time(setup, work, hardware) if hardware is not None else None
    return Plan(
        model, device, precision, setup, work, memory_of(setup), room, time,
        config.train.steps, sizes, tuple(notes),
    )  # fmt: skip


def vllm_beside(sampler: Any, setup: Setup, device: Device) -> list[str]:
    """What `sampler=vllm` needs of a card beside what is counted."""
    ranks, each = sampler.tensor_parallel, setup.bytes * setup.whole / sampler.tensor_parallel / GIB
    together = f", of which {ranks} ranks together hold one engine, {each:.1f} GiB of weights each" if ranks > 1 else ""
    notes = [f"vLLM's own weights and cache are not counted: it takes the share of the card it is given{together}"]
    if device.is_gpu and each >= (share := sampler.memory_share * device.memory_gib):
        notes.append(
            f"sampler.memory_share={sampler.memory_share:g} gives vLLM {share:.1f} GiB of a card, and its weights "
            f"there are {each:.1f} GiB: raise sampler.tensor_parallel (now {ranks}) or sampler.memory_share"
        )
    return notes


def larger_than_card(setup: Setup, device: Device, room: float, *, draws: bool) -> list[str]:
    """What becomes of a model whose weights a card cannot hold all at once, at stage 3. `draws`: in training or in
    evaluation."""
    whole, found = weights(setup), list[str]()
    if device.is_gpu and spreads(setup) and whole > room:
        found.append(
            f"all weights ({whole / GIB:.1f} GiB) are more than can be used of a card: they are checked on the CPU and "
            "become shards one parameter after another"
        )
    if draws and draws_by_layer(setup):
        found.append(
            "completions are drawn with weights that are gathered a layer at a time, anew for every token "
            f"({(whole - around_layers(setup)) / GIB:.1f} GiB each time): slow, and the less so the more rows are "
            "drawn at once; sampler=dataset eval.problems=0 draws none"
        )
    return found


# What follows --------------------------------------------------------------------------------------------------------


def largest_micro_batch(plan: Plan) -> int | None:
    """The most tokens of a micro-batch (train.micro_batch_tokens) that fit, up to all rows of a step at once; None
    where not even one row does."""
    prompt, teacher, completion = plan.lengths
    most = plan.work.rows

    def fits(rows: int) -> bool:
        held = replace(
            plan.setup.rows, student=rows * (prompt + completion), teacher=rows * (teacher + completion),
            completion=rows * completion, several=rows < most,
        )  # fmt: skip
        return memory_of(replace(plan.setup, rows=held)).peak.total <= plan.room

    if not fits(1):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * plan.row


Change = Callable[[Setup], Setup]


def changes_of(plan: Plan) -> Iterator[tuple[str, Setup]]:
    """Words that make a step smaller, with what they make of it, those that cost least first."""
    setup, shape = plan.setup, plan.setup.shape
    if not setup.checkpoints:
        yield "train.gradient_checkpointing=true", replace(setup, checkpoints=True)
    if setup.teacher in ("copy", "moving", "update"):
        yield "teacher=live", replace(setup, teacher="shared")
    if setup.teacher == "other":
        yield "teacher=initial", replace(setup, teacher="shared" if setup.trained else "copy", other=None)
    if setup.trained == 0:
        small = replace(setup, trained=shape.adapter(16), lora_rank=16)
        yield "lora=r16", replace(small, teacher="shared" if setup.teacher == "copy" else setup.teacher)
    if setup.ranks > 1 and setup.stage < 3:
        yield "zero=stage3", replace(setup, stage=3)
    if plan.device.is_gpu and not setup.offload_optimizer:
        yield "zero=stage2_offload", replace(setup, stage=2, offload_optimizer=True)
    if plan.device.is_gpu and setup.trained and not setup.four_bit:
        yield "model.quantize=4bit", replace(setup, four_bit=True)
    if plan.device.is_gpu and setup.checkpoints and (not setup.offloads or setup.tiles < 4):
        yield "train.offload_activations=true train.mlp_tiles=4", replace(setup, offloads=True, tiles=4)


def what_to_change(plan: Plan) -> list[tuple[str, float]]:
    """For a recipe that does not fit: words that make it fit, with what it takes then; or where none does alone, all
    that help, the most helpful first."""
    found = [(words, memory_of(setup).peak.total) for words, setup in changes_of(plan)]
    enough = [(words, peak) for words, peak in found if peak <= plan.room]
    helpful = sorted((one for one in found if one[1] < plan.memory.peak.total), key=lambda one: one[1])
    return enough or helpful


def beside_second_model(plan: Plan) -> list[tuple[int, float, float]]:
    """The same as distillation from a second, frozen model of 1, 2 and 4 times the weights: how many times, its peak,
    and the share of it that self-distillation saves."""
    if not plan.setup.passes:
        return []
    own = plan.memory.peak.total
    rows = []
    for times in TEACHERS:
        other = replace(plan.setup, teacher="other", other=larger(plan.setup.shape, times), other_shards=1)
        peak = memory_of(other).peak.total
        rows.append((times, peak, 1 - own / peak))
    return rows


def larger(shape: Shape, times: int) -> Shape:
    """A model of about so many times the weights: as many more layers, so that the vocabulary's share stays."""
    layers = shape.layers
    one = (shape.in_layers + sum(layer.other for layer in layers)) / len(layers)
    more = round((times - 1) * shape.parameters / one)
    return replace(shape, layers=(*layers, *(layers[place % len(layers)] for place in range(more))))


@dataclass(frozen=True)
class Growth:
    """The same rows on each of so many ranks."""

    stage: int
    ranks: int
    peak: float
    seconds: float | None
    fits: bool


def growth_of(plan: Plan, *, stages: Sequence[int] = STAGES, ranks: Sequence[int] = RANKS) -> list[Growth]:
    """Memory of a rank and seconds of a step where each rank keeps the rows it has now."""
    found = []
    for stage in stages:
        for count in ranks:
            setup = with_ranks(plan.setup, count, stage)
            hardware, peak = hardware_of(setup, plan.device, plan.precision), memory_of(setup).peak.total
            time = step_time(setup, plan.work, hardware) if hardware is not None else None
            seconds = None if time is None or time.links is None else time.total
            room = plan.room if plan.device.is_gpu else room_of(plan.device, ranks=count)
            found.append(Growth(stage, count, peak, seconds, peak <= room))
    return found


def one_line(plan: Plan) -> str:
    """For the start of a run."""
    peak, takes = plan.memory.peak, "" if plan.time is None else f"; a step about {seconds_in_words(plan.time.total)}"
    room = f"{plan.room / GIB:.1f} GiB that can be used"
    verdict = f"of {room}" if plan.fits else f"more than the {room}, so it may run out: opsd plan says what to change"
    return (
        f"memory: at most about {peak.total / GIB:.2f} GiB a rank, beside the libraries, in {PHASES[peak.name]}, "
        f"{verdict}{takes} (estimates of opsd plan)"
    )


PHASES = {
    "student": "the student's pass",
    "teacher": "the teacher's pass",
    "drawing": "drawing completions",
    "update": "the update",
}


def seconds_in_words(seconds: float) -> str:
    """Two digits are all that a plan knows."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:,.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.2g} ms"
