"""From settings, a device and the lengths of rows to what the closed forms of memory and time take."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opsd_cli.insight.model_shape import Shape
from opsd_cli.insight.plan_case import FRAGMENTS, GIB, MIB, Rows, Setup, TeacherWeights, usable
from opsd_cli.insight.plan_time import Hardware, Work
from opsd_cli.settings.config import Config
from opsd_cli.settings.known_devices import Card, Cluster, Precision


@dataclass(frozen=True)
class Device:
    """What each rank runs on."""

    name: str
    memory_gib: float  # of a card, or of the machine for a CPU
    card: Card | None = None  # None: a CPU, or a card that the table does not have
    cluster: Cluster | None = None
    is_gpu: bool = True


@dataclass(frozen=True)
class Lengths:
    """Tokens of the two prompts; None: as long as the recipe allows."""

    prompt: int | None = None
    teacher_prompt: int | None = None
    completion: int | None = None


def machine_memory_gib() -> float:
    """What this machine has free for new programs."""
    facts = Path("/proc/meminfo")
    if facts.exists():
        lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) / 2**20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def this_cpu() -> Device:
    return Device("this machine's CPU", machine_memory_gib(), is_gpu=False)


def precision_of(config: Config, device: Device) -> Precision:
    """The number format of the weights, as `engine.device.choose_dtype` takes it."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if not device.is_gpu:
        return "float32"
    return "bfloat16" if device.card is None or device.card.has_bfloat16 else "float16"


def hardware_of(setup: Setup, device: Device, precision: Precision) -> Hardware | None:
    if device.is_gpu and device.card is None:
        return None
    return Hardware(device.card, precision, threads=setup.threads, cluster=device.cluster)


def room_of(device: Device, *, ranks: int) -> float:
    """Bytes that a rank may use: a card but for fragments and CUDA's own, or its part of a machine's memory."""
    if device.is_gpu:
        return usable(device.memory_gib)
    return (1 - FRAGMENTS) * device.memory_gib * GIB / ranks


def setup_of(
    config: Config, shape: Shape, device: Device, *, ranks: int, other: Shape | None = None, threads: int = 1
) -> Setup:
    """Everything but the lengths of rows."""
    zero, train, lora = config.zero, config.train, config.lora
    bundled: Any = config.teacher
    placement = getattr(bundled, "placement", "replicated")
    return Setup(
        shape,
        Rows(0, 0, 0, False, 0, 0, 0),
        bytes=4 if precision_of(config, device) == "float32" else 2,
        trained=shape.adapter(lora.rank, lora.targets) if lora.rank else 0,
        lora_rank=lora.rank,
        stage=zero.stage,
        ranks=ranks,
        hpz_ranks=zero.hpz_ranks,
        offload_optimizer=zero.offload_optimizer == "cpu",
        offload_parameters=zero.offload_parameters == "cpu",
        bucket=zero.bucket_mib * MIB,
        gather=zero.gather,
        half_states=config.optim.state_dtype == "bfloat16",
        four_bit=config.model.quantize == "4bit",
        teacher=teacher_weights(config),
        other=other,
        other_shards={"replicated": 1, "sharded": ranks, "offloaded": 0}[placement],
        passes=passes_of(config),
        checkpoints=train.gradient_checkpointing,
        offloads=train.offload_activations,
        tiles=train.mlp_tiles,
        card=device.memory_gib if device.is_gpu else None,
        chunk=None if config.loss.chunk_mib is None else config.loss.chunk_mib * MIB,
        threads=threads,
        draws=config.sampler.plugin_name not in ("dataset", "vllm"),
    )


def teacher_weights(config: Config) -> TeacherWeights:
    """What the teacher holds beside the student's weights; a teacher of the user's own is taken to hold nothing."""
    adapter = config.lora.rank > 0
    kinds: dict[str, TeacherWeights] = {
        "none": "none",
        "initial": "shared" if adapter else "copy",
        "blend": "shared" if adapter else "copy",
        "ema": "update" if adapter else "moving",
        "sync": "copy",
        "external": "other",
    }
    return kinds.get(config.teacher.plugin_name, "shared")


def passes_of(config: Config) -> int:
    """Passes that the target is made of."""
    if config.teacher.plugin_name == "none":
        return 0
    own = 2 if config.teacher.plugin_name == "blend" else 1
    return own * (2 if config.target.kind in ("guided", "average") else 1)


def row_lengths(config: Config, lengths: Lengths) -> tuple[int, int, int]:
    """Tokens of the student's prompt, the teacher's and a completion."""
    longest = config.prompts.max_tokens
    prompt = lengths.prompt or longest
    teacher = lengths.teacher_prompt or (2 * prompt if lengths.prompt else longest)
    return prompt, teacher, lengths.completion or config.sampling.max_completion_tokens


def with_rows(config: Config, setup: Setup, lengths: tuple[int, int, int], *, tokens: int) -> tuple[Setup, Work]:
    """The setup with the rows of a step, in micro-batches of at most `tokens` tokens of the longer role."""
    prompt, teacher, completion = lengths
    rows = -(-config.train.problems_per_step // setup.ranks) * config.train.rollouts_per_problem
    longer = max(prompt, teacher if setup.passes else 0) + completion
    batches = min(rows, max(1, -(-rows * longer // tokens)))
    size = -(-rows // batches)
    sampler: Any = config.sampler
    columns = prompt + completion
    drawn = min(rows, getattr(sampler, "max_rows", rows), max(1, getattr(sampler, "cache_tokens", 2**40) // columns))
    held = Rows(
        size * (prompt + completion), size * (teacher + completion), size * completion, batches > 1, drawn, prompt,
        completion,
    )  # fmt: skip
    work = Work(
        rows * (prompt + completion), rows * (teacher + completion), rows * completion, rows, completion, rows * prompt,
        batches,
    )  # fmt: skip
    return replace(setup, rows=held), work
