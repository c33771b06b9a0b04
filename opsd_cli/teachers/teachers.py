"""Teachers: which weights score the completion under the teacher's prompt, and when they move. Importing it does not
import torch.

A teacher is a settings dataclass whose `build` returns the live object with four methods: `score` (hidden states of a
batch, without gradient), `after_update`, `save` and `load`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field

from opsd_cli.settings.config import TargetSettings
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from opsd_cli.data.pairing import PairedBatch, TokenBatch
    from opsd_cli.loss.types import TokenMixture, TokenScores


class StandIn(Protocol):
    """A copy of weights that can stand in for them."""

    def swapped_in(self) -> AbstractContextManager[None]: ...

    def move_towards_weights(self, share: float) -> None: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class TeachingEngine(Protocol):
    """What a teacher may ask of the engine: to score, and to hold other weights than the student's."""

    @property
    def has_adapter(self) -> bool: ...

    def adapter_off(self) -> AbstractContextManager[None]: ...

    def score(self, batch: TokenBatch, *, own_head: bool = False) -> TokenScores: ...

    def copy_weights(self, *, moves: bool) -> StandIn: ...

    def average_weights(self) -> StandIn: ...

    def load_other(self, path: str, revision: str | None, *, placement: str) -> OtherModel: ...


class OtherModel(Protocol):
    """A second, frozen model."""

    def score(self, batch: TokenBatch) -> TokenScores: ...


class Teacher(Protocol):
    """The live object. A class that inherits from this one may leave out the last three: it never moves, and a resume
    gets its weights from the model itself."""

    def score(self, batch: TokenBatch) -> TokenScores | TokenMixture:
        """Hidden states [N, D] of the positions that predict completion tokens, without gradient."""

    def after_update(self, update: int) -> None:
        """Called once after each update that was made, number `update` of the run (from 1, also over a resume); a step
        may make several. Only a moving teacher moves."""
        return None

    def save(self, folder: Path, *, rank: int) -> None:
        """Write what a resume cannot get elsewhere."""
        return None

    def load(self, folder: Path, *, rank: int) -> None:
        """The inverse of `save`."""
        return None


class _FixedTeacher(Teacher):
    """Answers with one function, which scores a batch without gradient."""

    def __init__(self, score: Callable[[TokenBatch], TokenScores | TokenMixture]) -> None:
        self._score = score

    def score(self, batch: TokenBatch) -> TokenScores | TokenMixture:
        return self._score(batch)


@plugin("teacher", "live")
class Live:
    """The student's own current weights under the teacher's prompt: no memory, but unstable at high learning rates."""

    def build(self, engine: TeachingEngine) -> Teacher:
        return _FixedTeacher(engine.score)


@plugin("teacher", "initial")
class Initial:
    """The weights at step 0: the adapter switched off under LoRA, else a copy (sharded where the weights are)."""

    def build(self, engine: TeachingEngine) -> Teacher:
        # Taken now, before any checkpoint is loaded: a resume makes the copy again from the model.
        initial = None if engine.has_adapter else engine.copy_weights(moves=False)

        def score(batch: TokenBatch) -> TokenScores:
            # The loss reads the head after the student's weights are back, so a copy's own head is kept beside the
            # states.
            with engine.adapter_off() if initial is None else initial.swapped_in():
                return engine.score(batch, own_head=initial is not None)

        return _FixedTeacher(score)


@plugin("teacher", "ema")
class Ema:
    """A moving average of the student, in fp32: teacher <- (1 - rate) * teacher + rate * student after each update.
    Under LoRA what adapters add to the weights is averaged (an average of the factors is not one of their product) and
    runs beside the frozen weights, as adapters do: merged in half precision most of it would be rounded away."""

    rate: Annotated[float, Field(gt=0, le=1)]

    def build(self, engine: TeachingEngine) -> Teacher:
        return _MovingTeacher(engine, engine.average_weights(), rate=self.rate, every=1, adapter_off=True)


@plugin("teacher", "sync")
class Sync:
    """A copy of the student, renewed every `every` updates and frozen in between."""

    every: Annotated[int, Field(gt=0)]

    def build(self, engine: TeachingEngine) -> Teacher:
        copy = engine.copy_weights(moves=False)
        return _MovingTeacher(engine, copy, rate=1.0, every=self.every, adapter_off=False)


class _MovingTeacher:
    """Answers with a copy of the weights that moves towards them every `every` updates."""

    def __init__(self, engine: TeachingEngine, copy: StandIn, *, rate: float, every: int, adapter_off: bool) -> None:
        self._engine, self._copy, self._rate, self._every = engine, copy, rate, every
        self._adapter_off = adapter_off and engine.has_adapter

    def score(self, batch: TokenBatch) -> TokenScores:
        with self._engine.adapter_off() if self._adapter_off else nullcontext(), self._copy.swapped_in():
            # Under LoRA the head is frozen and the same for both roles.
            return self._engine.score(batch, own_head=not self._engine.has_adapter)

    def after_update(self, update: int) -> None:
        if update % self._every == 0:
            self._copy.move_towards_weights(self._rate)

    def save(self, folder: Path, *, rank: int) -> None:
        self._copy.save(folder)

    def load(self, folder: Path, *, rank: int) -> None:
        self._copy.load(folder)


@plugin("teacher", "blend")
class Blend:
    """A trust region between the initial and the live weights, in logits:
    q ~ exp((1 - live) * log q_initial + live * log q_live). Above 1 it goes on from the initial beyond the live weights
    (RISE, 2609.05295). One forward more, no copy beyond the initial teacher's."""

    live: Annotated[float, Field(gt=0)]

    def build(self, engine: TeachingEngine) -> Teacher:
        passes = ((1.0 - self.live, Initial().build(engine)), (self.live, Live().build(engine)))

        def score(batch: TokenBatch) -> TokenMixture:
            from opsd_cli.loss.types import TokenMixture

            return TokenMixture(
                tuple(part for weight, teacher in passes for part in teacher.score(batch).weighted(weight))
            )

        return _FixedTeacher(score)


@plugin("teacher", "external")
class External:
    """Another, frozen model with the same tokenizer: on-policy distillation, for comparison."""

    path: str | None  # hub id, local folder or bundled:NAME; None: refused, there is no such model
    revision: str | None
    # Whole on each rank, over the ranks, or streamed from the CPU.
    placement: Literal["replicated", "sharded", "offloaded"]

    def build(self, engine: TeachingEngine) -> Teacher:
        assert self.path is not None, "refused by opsd_cli.checks"
        return _FixedTeacher(engine.load_other(self.path, self.revision, placement=self.placement).score)


@plugin("teacher", "none")
class NoTeacher:
    """No teacher and no second forward: for divergence=cross_entropy, which needs none."""

    def build(self, engine: TeachingEngine) -> None:
        return None


def score_target(teacher: Teacher, batch: PairedBatch, settings: TargetSettings) -> TokenScores | TokenMixture:
    """What the student is pulled towards in a batch: the teacher's pass, or several combined as the settings say.

    barycentre  log q' = w log q + (1 - w) log p: between teacher and student, p held constant (DemoPSD, 2607.02502)
    guided      log q' = log q + w (log q - log q_other): what the context adds beyond the other prompt, amplified.
                other = free: the teacher's weights without any reference; reference_only: with the reference and no
                problem (Purified OPSD, 2607.02234); wrong: with another problem's reference (contrast); view: under
                a message of the user's own. Between 0 and -1 the target lies between the two passes (beta-OPSD,
                2607.28582): with other = view what two privileged views agree on (AVSD, 2605.20643)
    average     q' = (1 - w) q + w q_other: the mean of the two passes in probability

    A temperature flattens (above 1) or sharpens the teacher's passes before they are combined. Everything is
    renormalised over the vocabulary.
    """
    scores, cooling, weight = teacher.score(batch.teacher), 1.0 / settings.temperature, settings.weight
    if settings.kind == "teacher" and settings.temperature == 1.0:
        return scores
    from opsd_cli.loss.types import TokenMixture

    # log softmax(log q / t) differs from log q / t by a constant of the token, which renormalising takes out.
    if settings.kind == "teacher":
        return TokenMixture(scores.weighted(cooling))
    if settings.kind == "barycentre":
        return TokenMixture(scores.weighted(weight * cooling), student_weight=1.0 - weight)
    # Where no rollout of the batch could be shown anything, none has a third prompt, and none carries loss.
    assert batch.other is not None or batch.weight == 0, "a target of two passes needs the other prompt"
    other = teacher.score(batch.other or batch.teacher)
    if settings.kind == "average":
        return TokenMixture(scores.weighted(1.0 - weight) + other.weighted(weight), in_probabilities=True)
    return TokenMixture(scores.weighted((1.0 + weight) * cooling) + other.weighted(-weight * cooling))
