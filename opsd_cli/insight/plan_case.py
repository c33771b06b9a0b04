"""Everything that decides the memory and the time of a rank, in one value: what `plan_setup` makes of settings and
what the closed forms of `plan_memory` and `plan_time` take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opsd_cli.insight.model_shape import Shape

GIB, MIB = 2**30, 2**20
CUDA = 0.6 * GIB  # that CUDA, its kernels and libraries take of a card
FRAGMENTS = 0.05  # of a card that no plan should count on

TeacherWeights = Literal["none", "shared", "copy", "moving", "update", "other"]
"""What a teacher holds beside the student: nothing (no teacher, or the student's own weights), a copy in the weights'
type, a moving copy in fp32, the fp32 product of moving adapters, another model."""


@dataclass(frozen=True)
class Rows:
    """The lengths that a peak depends on, in tokens."""

    student: int  # of the largest micro-batch, under the student's prompt
    teacher: int  # of the same, under the teacher's
    completion: int  # completion tokens of the same
    several: bool  # whether a rank takes more than one micro-batch for an update
    drawn: int  # rows that are drawn at once
    prompt: int  # of the longest prompt that is completed
    longest: int  # of a completion


@dataclass(frozen=True)
class Setup:
    """Everything that decides the memory of a rank."""

    shape: Shape
    rows: Rows
    bytes: int = 2  # of a weight: 4, or 2 in half precision
    trained: int = 0  # weights of adapters; 0: all weights are trained
    lora_rank: int = 0
    stage: int = 2
    ranks: int = 1
    hpz_ranks: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 64 * MIB
    gather: Literal["auto", "model", "layer"] = "auto"
    half_states: bool = False
    four_bit: bool = False
    teacher: TeacherWeights = "shared"
    other: Shape | None = None
    other_shards: int = 1  # ranks that the other model is spread over; 0: it streams from host memory
    passes: int = 1  # of the target; 0: no teacher
    checkpoints: bool = True
    offloads: bool = False
    tiles: int = 1
    card: float | None = None  # GiB; None: a CPU
    chunk: int | None = None  # bytes; None: by the device
    threads: int = 1
    draws: bool = True  # whether completions are drawn in this process

    @property
    def whole(self) -> int:
        return self.shape.parameters

    @property
    def learns(self) -> int:
        """Weights that are trained."""
        return self.trained or self.whole

    @property
    def sharding(self) -> int:
        """The stage that DeepSpeed is told (`engine.zero_config.effective_stage`)."""
        if self.bytes == 2:
            return max(2, self.stage)
        return 0 if self.ranks == 1 and self.stage in (1, 2) and not self.offload_optimizer else self.stage


def usable(card: float) -> float:
    """Bytes of a card of so many GiB that a plan counts on."""
    return (1 - FRAGMENTS) * card * GIB - CUDA
