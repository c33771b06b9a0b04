"""A divergence of two: which of them a token gets is decided by the token, or by the completion it is part of.
Importing it does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from opsd_cli.loss.aligned import AlignedTokens, measure
from opsd_cli.loss.by_value import HasValue
from opsd_cli.loss.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL, TotalVariation
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from torch import Tensor

Branch = Literal["forward_kl", "reverse_kl", "jsd", "total_variation"]
By = Literal["right_answer", "student_entropy", "teacher_entropy", "entropy_gap"]

BRANCHES: dict[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": GeneralizedJSD(beta=0.5, normalize=False),
    "total_variation": TotalVariation(),
}


@plugin("divergence", "routed")
class Routed:
    """`above` at tokens whose measure is above `bound`, `below` at all others.

    student_entropy, teacher_entropy: of that role's distribution, nats
    entropy_gap: the student's entropy minus the teacher's, nats
    right_answer: 1 for a token of a completion with the right answer, else 0

    Which of the two a token gets is held constant in the gradient. Both are computed at every token.
    """

    by: By
    above: Branch
    below: Branch
    bound: float

    needs_teacher = True

    def with_branches(self, change: Callable[[Divergence], Divergence]) -> Router:
        """The same route between two changed divergences."""
        return Router(self.by, self.bound, change(BRANCHES[self.above]), change(BRANCHES[self.below]))

    def value(self, tokens: AlignedTokens) -> Tensor:
        return self.with_branches(lambda branch: branch).value(tokens)

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        return self.with_branches(lambda branch: branch).value_and_gradient(tokens)


@dataclass(frozen=True)
class Router:
    """A `Routed` whose branches are live divergences, each perhaps with a clip and over a part of the vocabulary."""

    by: By
    bound: float
    above: Divergence
    below: Divergence

    needs_teacher = True

    def with_branches(self, change: Callable[[Divergence], Divergence]) -> Router:
        return replace(self, above=change(self.above), below=change(self.below))

    def value(self, tokens: AlignedTokens) -> Tensor:
        assert isinstance(self.above, HasValue)
        assert isinstance(self.below, HasValue)
        return self.above.value(tokens).where(self._is_above(tokens), self.below.value(tokens))

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        above_n, below_n = (branch.value_and_gradient(tokens) for branch in (self.above, self.below))
        is_above_n = self._is_above(tokens)
        return above_n[0].where(is_above_n, below_n[0]), above_n[1].where(is_above_n.unsqueeze(1), below_n[1])

    def _is_above(self, tokens: AlignedTokens) -> Tensor:
        return measure(self.by, tokens).detach() > self.bound
