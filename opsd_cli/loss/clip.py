"""Clips: what is done about tokens whose divergence is large (mostly style, where the teacher's wording differs). A
clip wraps any divergence and is one itself. Importing it does not import torch.

    none      nothing
    entry     min(contribution, limit) for each vocabulary entry, as published (2601.18734 v3). Beware: on a clipped
              entry the gradient changes sign. It pushes the student away from the very token the teacher prefers, and
              the loss can be negative. Offered for parity with the paper.
    neutral   the target is the student's own probability on clipped entries, and the teacher's, rescaled, elsewhere:
              a proper distribution, so the loss is not negative and a clipped entry gets exactly no gradient
    token     a token's loss and gradient are scaled down to `limit`: less of it, in the same direction
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.by_value import HasValue
from opsd_cli.loss.divergences import Divergence, Entrywise, ForwardKL, is_sum_of_entries
from opsd_cli.loss.routed import Routed, Router
from opsd_cli.settings.config import ClipSettings
from opsd_cli.settings.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def apply_clip(divergence: Divergence, settings: ClipSettings) -> Divergence:
    """`divergence` with the chosen clip. Raises ConfigError where the two do not fit."""
    if settings.kind == "none":
        return divergence
    if isinstance(divergence, Routed | Router):  # each branch is clipped; where a token goes is not changed by that
        return divergence.with_branches(lambda branch: apply_clip(branch, settings))
    if settings.kind == "token":
        return TokenClip(divergence, settings.limit)
    if settings.kind == "neutral":
        if type(divergence) is not ForwardKL:  # what a clipped entry gets is worked out for its formula alone
            raise ConfigError("clip.kind=neutral is defined for divergence=forward_kl only; use clip=token")
        return NeutralClip(divergence, settings.limit)
    if not is_sum_of_entries(divergence):
        raise ConfigError(
            "clip.kind=entry needs a divergence that is a sum over the vocabulary and says of which `entries`; "
            "use clip=token"
        )
    return EntryClip(divergence, settings.limit)


@dataclass(frozen=True)
class EntryClip(Entrywise):
    """sum over the vocabulary of min(contribution, limit)."""

    base: Entrywise
    limit: float

    def value(self, tokens: AlignedTokens) -> Tensor:
        return self.base.entries(tokens)[0].clamp(max=self.limit).sum(dim=1)

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        contribution_nV, gradient_nV = self.base.entries(tokens)
        over_nV = contribution_nV > self.limit
        # Zero with respect to log p, not to the logit: through the softmax a clipped entry still gets -p * sum(g),
        # which is the sign change of the docstring above.
        return contribution_nV.clamp(max=self.limit), gradient_nV.masked_fill(over_nV, 0.0)


@dataclass(frozen=True)
class NeutralClip:
    """Forward KL to a target that equals the student where an entry's contribution passes `limit`."""

    base: ForwardKL
    limit: float

    needs_teacher = True

    def value(self, tokens: AlignedTokens) -> Tensor:
        return self.base.value(self._clipped(tokens))

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        return self.base.value_and_gradient(self._clipped(tokens))

    def _clipped(self, tokens: AlignedTokens) -> AlignedTokens:
        """The same tokens with the target in the teacher's place."""
        contribution_nV, _ = self.base.entries(tokens)
        over_nV = contribution_nV > self.limit
        # On clipped entries the target is p, so p - target is 0 there. The probability that is left is shared out as
        # the teacher shares it, so that the target sums to 1.
        kept_n1 = tokens.student_probs_nV.masked_fill(over_nV, 0.0).sum(dim=1, keepdim=True)
        teacher_n1 = tokens.teacher_probs_nV.masked_fill(over_nV, 0.0).sum(dim=1, keepdim=True)
        tiny = 1e-30
        scaled_nV = tokens.teacher_logprobs_nV + (kept_n1.clamp(min=tiny).log() - teacher_n1.clamp(min=tiny).log())
        target_nV = scaled_nV.where(~over_nV, tokens.student_logprobs_nV).detach()
        return AlignedTokens(tokens.student_logprobs_nV, target_nV, tokens.sampled_n)


@dataclass(frozen=True)
class TokenClip:
    """value * min(1, limit / value), the factor held constant in the gradient."""

    base: Divergence
    limit: float

    @property
    def needs_teacher(self) -> bool:
        return self.base.needs_teacher

    def value(self, tokens: AlignedTokens) -> Tensor:
        assert isinstance(self.base, HasValue)
        value_n = self.base.value(tokens)
        return value_n * (self.limit / value_n.clamp(min=1e-30)).clamp(max=1.0).detach()

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        value_n, gradient_nV = self.base.value_and_gradient(tokens)
        factor_n = (self.limit / value_n.clamp(min=1e-30)).clamp(max=1.0)
        return value_n * factor_n, gradient_nV * factor_n.unsqueeze(1)
