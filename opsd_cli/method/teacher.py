"""Teachers: whose weights answer under the teacher's prompt, and when they move. Owns that choice; knows nothing of
prompts, divergences or sharding. Importing it does not import torch.

A teacher is a settings dataclass whose `build` returns the live object with four methods: `score` (hidden states of a
batch, without gradient), `after_step`, `save` and `load`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from opsd_cli.data.pairing import TokenBatch
    from opsd_cli.method.loss import TokenScores
    from opsd_cli.settings.config import Config


class WeightCopy(Protocol):
    """A copy of the trainable weights that can stand in for them."""

    def swapped_in(self) -> AbstractContextManager[None]: ...


class AdapterPolicy(Protocol):
    """What a teacher may ask of the policy."""

    @property
    def has_adapter(self) -> bool: ...

    def adapter_off(self) -> AbstractContextManager[None]: ...


class Engine(Protocol):
    """What a teacher may ask of the engine."""

    policy: AdapterPolicy

    def score(self, batch: TokenBatch, *, own_head: bool = False) -> TokenScores: ...

    def copy_weights(self, *, moves: bool) -> WeightCopy: ...


class Teacher(Protocol):
    """The live object."""

    def score(self, batch: TokenBatch) -> TokenScores:
        """Hidden states [N, D] of the positions that predict completion tokens, without gradient."""

    def after_step(self, step: int) -> None:
        """Called once after update `step` (counted from 1); only a moving teacher moves."""

    def save(self, folder: Path, *, rank: int) -> None:
        """Write what a resume cannot get elsewhere."""

    def load(self, folder: Path, *, rank: int) -> None:
        """The inverse of `save`."""


class Stateless:
    """A teacher that never moves and whose weights a resume gets from the model itself."""

    def after_step(self, step: int) -> None:
        return None

    def save(self, folder: Path, *, rank: int) -> None:
        return None

    def load(self, folder: Path, *, rank: int) -> None:
        return None


@plugin("teacher", "live")
class Live:
    """The student's own current weights under the teacher's prompt. Costs no memory; unstable at high learning rates."""

    def build(self, engine: Engine) -> Teacher:
        return _LiveTeacher(engine)


class _LiveTeacher(Stateless):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def score(self, batch: TokenBatch) -> TokenScores:
        return self._engine.score(batch)


@plugin("teacher", "initial")
class Initial:
    """The weights at step 0: the adapter switched off under LoRA, else a copy (sharded where the weights are)."""

    def build(self, engine: Engine) -> Teacher:
        return _AdapterOffTeacher(engine) if engine.policy.has_adapter else _FrozenCopyTeacher(engine)


class _AdapterOffTeacher(Stateless):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def score(self, batch: TokenBatch) -> TokenScores:
        with self._engine.policy.adapter_off():
            return self._engine.score(batch)


class _FrozenCopyTeacher(Stateless):
    """The copy is taken when this is built, before any checkpoint is loaded: a resume makes it again from the model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._copy = engine.copy_weights(moves=False)

    def score(self, batch: TokenBatch) -> TokenScores:
        with self._copy.swapped_in():
            return self._engine.score(batch, own_head=True)


@plugin("teacher", "none")
class NoTeacher:
    """No teacher and no second forward: for divergence=cross_entropy, which needs none."""

    def build(self, engine: Engine) -> None:
        return None

    def contradictions(self, config: Config) -> list[str]:
        if config.divergence.needs_teacher:
            return [f"divergence={config.divergence.plugin_name} needs a teacher; use teacher=initial"]
        return []
