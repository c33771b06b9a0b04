"""What ends an update early or repeats it: a request to stop, memory that runs out, a loss that is not finite, an
overflow in float16. Apart from the loop, which is the method; every rank decides the same at the same place, before the
next collective, because a rank that leaves alone keeps the others waiting.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.data.problems import Rollout
from opsd_cli.loss.types import TokenLoss, Update
from opsd_cli.settings.config import Config, ZeroSettings
from opsd_cli.settings.memory_errors import Shortage, shortage_of
from opsd_cli.settings.registry import LimitsRows
from opsd_cli.training.engine_protocol import Engine, RankGroup
from opsd_cli.training.step_report import StepRecord

Made = TypeVar("Made")


class StopRequested(Exception):
    """Every rank has agreed to stop. The weights are those of the last finished update."""


class OutOfMemory(Exception):
    """A micro-batch did not fit into the memory of some rank. Raised on every rank at the same place."""


class NotFinite(Exception):
    """The loss of a micro-batch is not finite on some rank. Raised on every rank at the same place, with the rollouts
    of this rank's first such micro-batch, where it has one."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        super().__init__("the loss is not finite")
        self.rollouts = rollouts


class StopFlag:
    """Set by the first SIGINT or SIGTERM, which the supervisor passes on to every rank; read once per token and once
    per micro-batch."""

    def __init__(self) -> None:
        self.signal_number = 0

    def listen(self) -> None:
        """Take over both signals in this process."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signal_number = self.signal_number or number

        signal.signal(signal.SIGINT, note)
        signal.signal(signal.SIGTERM, note)

    def is_set(self) -> bool:
        return self.signal_number != 0


@dataclass
class TokenBudget:
    """Tokens of one micro-batch, until the run ends; halved whenever memory runs out."""

    tokens: int


def stop_together(ranks: RankGroup, should_stop: Callable[[], bool]) -> None:
    """Raise StopRequested on every rank if any was asked to stop."""
    if ranks.any(should_stop()):
        raise StopRequested


def within_memory(work: Callable[[], Made], *, recovers: bool) -> Made | None:
    """What `work` returns; None if it ran out of memory and `recovers`, with everything freed that it held. Only where
    an allocation failed and nothing else: smaller pieces do not repair a broken communicator or kernel."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        shortage = shortage_of(error)
        if not recovers or shortage is None or not shortage.is_recoverable:
            raise
    # Outside the handler: the error's traceback would keep the tensors of every frame it came through.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


class UpdateGuard:
    """The checks of one update, micro-batch by micro-batch."""

    def __init__(
        self,
        ranks: RankGroup,
        batches: Sequence[PairedBatch],
        should_stop: Callable[[], bool],
        *,
        may_stop: bool,
        recovers: bool,
    ) -> None:
        self._ranks, self._should_stop, self._may_stop = ranks, should_stop, may_stop
        # A micro-batch of a single rollout cannot be cut, so that trying again would fail again.
        self._recovers = recovers and ranks.any(any(len(batch.rollouts) > 1 for batch in batches))
        self._are_finite: list[tuple[PairedBatch, Tensor]] = []  # whether a micro-batch's loss is, on the device

    def loss_of(self, batch: PairedBatch, score: Callable[[], TokenLoss]) -> TokenLoss:
        """What `score` returns. Raises StopRequested or OutOfMemory on every rank where it happens on any, before the
        backward pass, in which a rank that leaves alone would keep the others waiting."""
        # One exchange carries both answers: ranks must agree before the backward pass, and once per micro-batch.
        loss = within_memory(score, recovers=self._recovers)
        stops, lacks = self._ranks.all_sum([self._should_stop() and self._may_stop, loss is None])
        if stops:
            raise StopRequested
        if loss is None or lacks:
            raise OutOfMemory
        self._are_finite.append((batch, loss.weighted_sum.detach().isfinite()))
        return loss

    def check_losses(self) -> None:
        """Raise NotFinite on every rank if any had a loss that is not finite. To be called once, when every micro-batch
        has added its gradient and before the update."""
        # Not after each loss: the host would wait for a GPU as often, which then has nothing to do until the next
        # kernels are queued. What ranks have exchanged by now is dropped with the gradient.
        flags = torch.stack([is_finite for _, is_finite in self._are_finite]).tolist()
        broken = [batch for (batch, _), is_finite in zip(self._are_finite, flags, strict=True) if not is_finite]
        if self._ranks.any(bool(broken)):
            raise NotFinite(broken[0].rollouts if broken else ())

    def backward(self, work: Callable[[], None]) -> None:
        """Do `work`. Raises OutOfMemory where memory runs out and there is one rank: with more, the others are in the
        collectives of this pass already."""

        def done() -> bool:
            work()
            return True

        if not within_memory(done, recovers=self._recovers and self._ranks.world_size == 1):
            raise OutOfMemory


def make_update(
    step: int,
    once: Callable[[Sequence[PairedBatch]], Update],
    batches: list[PairedBatch],
    record: StepRecord,
    *,
    engine: Engine,
    budget: TokenBudget,
    plan: Callable[[], list[PairedBatch]],
    free: Callable[[], None],
) -> tuple[Update, list[PairedBatch]]:
    """`once`, until it makes an update or refuses one, and the micro-batches it was made from. After running out of
    memory the same rollouts are tried again in smaller pieces, which `plan` makes, with the memory that `free` gives
    back; after an overflow the same update at half the scale. A loss or gradient that is not finite is refused, and the
    rollouts it may come from are noted."""
    while True:
        before = record.tokens.snapshot()
        try:
            update = once(batches)
        except NotFinite as error:
            engine.drop_gradients()
            record.suspects = list(error.rollouts)
            return Update(lr=engine.learning_rate(step), grad_norm=math.nan, refused="loss"), batches
        except OutOfMemory:
            engine.drop_gradients()
            free()
            record.tokens = before
            # Half of the largest micro-batch there was, since half of a budget that was never filled would change
            # nothing; of any rank, so that every rank halves to the same budget.
            mine = max(max(batch.student.tokens, batch.teacher.tokens) for batch in batches)
            budget.tokens = max(1, min(budget.tokens, engine.ranks.largest(mine)) // 2)
            batches = plan()
            continue
        # DeepSpeed has halved the scale by now; the rollouts are the same, so the update is the one that was meant.
        if update.overflow:
            record.tokens = before
            record.overflows += 1
            continue
        if update.refused:
            record.suspects = [rollout for batch in batches for rollout in batch.rollouts]
        return update, batches


def explain_out_of_memory(error: BaseException, config: Config, *, step: int, ranks: int, on_gpu: bool) -> str:
    """What to tell of an error that nothing recovered from: where, what ran out, and every setting that helps, with its
    value."""
    shortage = shortage_of(error) or Shortage("gpu", str(error).splitlines()[0])
    line = shortage.line
    offloads = "cpu" in (config.zero.offload_optimizer, config.zero.offload_parameters)
    if shortage.of == "pinned":
        return (
            f"out of page-locked host memory at step {step} ({line}); raise its limit (ulimit -l unlimited, docker run "
            "--ulimit memlock=-1)" + (f", or keep it on the GPU: zero=stage{config.zero.stage}" if offloads else "")
        )
    if shortage.of == "host" and on_gpu:
        keep = f", or keep more on the GPU: zero=stage{config.zero.stage}" if offloads else ""
        return f"out of host memory at step {step} ({line}); start fewer ranks on this machine: launcher.ranks{keep}"
    advice = f"{smaller(config)}, or {roomier(config.zero, ranks)}"
    if shortage.of == "nccl":
        return f"out of memory at step {step}: NCCL found no room for its buffers ({line}), and cannot go on; {advice}"
    if shortage.of == "suspected":
        return (
            f"probably out of memory at step {step} ({line}, as on a full GPU); {advice}; if it does not help, a "
            "kernel failed before it: CUDA_LAUNCH_BLOCKING=1 shows where"
        )
    recovery = "or let such a step be repeated in smaller pieces: train.halve_on_oom=true"
    if config.train.halve_on_oom:
        recovery = (
            "train.halve_on_oom did not apply: the other ranks were waiting in a collective, every micro-batch was a "
            "single rollout, or the error was outside a micro-batch"
        )
    return f"out of memory at step {step} ({line}); {advice}; {recovery}"


def smaller(config: Config) -> str:
    """The settings that make what stands in memory smaller, with their values."""
    lower: dict[str, int | str] = {
        "train.micro_batch_tokens": config.train.micro_batch_tokens,
        "sampling.max_completion_tokens": config.sampling.max_completion_tokens,
        "loss.chunk_mib": config.loss.chunk_mib or "null: 256, on a GPU a 64th of its memory",
    }
    if isinstance(config.sampler, LimitsRows):
        lower["sampler.max_rows"] = config.sampler.max_rows
    return f"lower {', '.join(f'{key} (now {value})' for key, value in lower.items())}"


def roomier(zero: ZeroSettings, ranks: int) -> str:
    """The next setting of ZeRO that leaves more memory. A single rank has no others to shard over."""
    if ranks > 1 and zero.stage < 3:
        return f"shard more: zero=stage3 (now stage {zero.stage})"
    next_one = "stage2_offload" if ranks == 1 and zero.offload_optimizer == "none" else "stage3_offload"
    return f"use the CPU's memory as well: zero={next_one}"
