"""What the step asks of the engine and of the group of ranks. The step knows these names only, so that it runs on any
engine: DeepSpeed's, or one without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from opsd_cli.teachers.teachers import TeachingEngine

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from opsd_cli.data.pairing import PairedBatch
    from opsd_cli.loss.types import ComputesLoss, TokenLoss, TokenMixture, TokenScores, Update, Work


class RankGroup(Protocol):
    """This rank among all, and what they agree on. Every method is collective."""

    rank: int
    world_size: int

    def all_sum(self, values: Sequence[float]) -> list[float]: ...

    def any(self, flag: bool) -> bool: ...

    def largest(self, value: int) -> int: ...

    def gather(self, value: Any) -> list[Any]: ...

    def from_first(self, value: Any) -> Any:
        """Rank 0's value."""

    def to_first(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on rank 0; nothing elsewhere."""

    def hand_out(self, values: Sequence[Any]) -> Any:
        """This rank's of rank 0's values, one for each rank."""

    def exchange(self, parcels: Mapping[int, bytes], expected: Mapping[int, int]) -> dict[int, bytes]:
        """Send each of these ranks its parcel; what others send to this one, from each so many bytes."""


class CountsPasses(Protocol):
    """Adds up the floating-point operations of this process."""

    def add_draws(self, prompt: int, completions: Sequence[int]) -> None:
        """Completions of so many tokens of one prompt."""

    def take(self) -> Work:
        """All since the last call."""


class Engine(TeachingEngine, Protocol):
    """The weights that are trained."""

    @property
    def ranks(self) -> RankGroup: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def meter(self) -> CountsPasses: ...

    @property
    def peak_flops(self) -> float | None:
        """Operations a second that this rank's device could do at most; None where that is not known."""

    @property
    def pads(self) -> bool:
        """Whether rows are padded to a rectangle when they are scored."""

    @property
    def shares(self) -> bool:
        """Whether rows can be scored of which several share a prompt that is run once."""

    def student_loss(
        self, batch: PairedBatch, target: TokenScores | TokenMixture | None, objective: ComputesLoss
    ) -> TokenLoss:
        """The objective of a micro-batch, with gradient."""

    def backward(self, weighted_sum: Tensor, *, denominator: float, last: bool) -> None:
        """Accumulate the gradient of weighted_sum / denominator; `last` marks the update's last micro-batch."""

    def step(self, step: float) -> Update:
        """Clip, update, clear. A gradient that is not finite is refused, on every rank."""

    def drop_gradients(self) -> None:
        """Forget what was accumulated since the last update."""

    def learning_rate(self, step: float) -> float: ...
