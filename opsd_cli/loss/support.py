"""The part of the vocabulary a divergence is taken over. A support wraps any divergence and is one itself. Importing it
does not import torch.

Full is exact. With the k likeliest tokens of one role (or of both), the rest of the probability is

    renormalise   ignored: both distributions are rescaled to the k tokens (neither bound nor unbiased)
    tail          one more outcome that stands for all of it (a lower bound of the full divergence)
    drop          left out of the sum without rescaling (may be negative; as published for OPCD)

With a tail every token is in some outcome, so a divergence that looks at the sampled token finds it: at its own column,
or at the tail's. Under the other two it may be in none, and such a divergence is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.by_value import HasValue
from opsd_cli.loss.divergences import Divergence, is_sum_of_entries
from opsd_cli.loss.routed import Routed, Router
from opsd_cli.settings.config import SupportSettings
from opsd_cli.settings.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

IMPOSSIBLE = -1e4  # log-probability of an outcome that is in neither distribution; finite, so that ratios are 0


def restrict_support(divergence: Divergence, settings: SupportSettings) -> Divergence:
    """`divergence` over the chosen part of the vocabulary. Raises ConfigError where the two do not fit."""
    if settings.side == "full":
        return divergence
    if isinstance(divergence, Routed | Router):  # where a token goes is decided over the whole vocabulary
        return divergence.with_branches(lambda branch: restrict_support(branch, settings))
    return Supported(divergence, settings)


@dataclass(frozen=True)
class Supported:
    """`base` over the chosen tokens."""

    base: Divergence
    settings: SupportSettings

    def __post_init__(self) -> None:
        if self.settings.rest == "drop" and not is_sum_of_entries(self.base):
            raise ConfigError(
                "support.rest=drop needs a divergence that is a sum over the vocabulary and says of which `entries`; "
                "use support.rest=tail or support.rest=renormalise"
            )

    @property
    def needs_teacher(self) -> bool:
        return self.base.needs_teacher

    def value(self, tokens: AlignedTokens) -> Tensor:
        """The value over the chosen outcomes; which these are is held constant."""
        assert isinstance(self.base, HasValue)
        if self.settings.k >= tokens.student_logprobs_nV.shape[1]:
            return self.base.value(tokens)
        few, _ = self._restricted(tokens)
        if self.settings.rest == "drop":
            assert is_sum_of_entries(self.base)
            return self.base.entries(few)[0].sum(dim=1)
        return self.base.value(few)

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        if self.settings.k >= tokens.student_logprobs_nV.shape[1]:
            return self.base.value_and_gradient(tokens)
        few, index_nK = self._restricted(tokens)
        through = {"renormalise": self._renormalised, "tail": self._with_tail, "drop": self._dropped}
        return through[self.settings.rest](tokens, few, index_nK)

    def _restricted(self, tokens: AlignedTokens) -> tuple[AlignedTokens, Tensor]:
        """The two distributions over the outcomes that are left, and the ids of the chosen tokens [n, K]."""
        from torch import cat

        # A token that both roles chose would count twice. Its second column is made an impossible outcome of both
        # distributions, which adds 0 to every divergence; removing it would give rows of unequal width.
        index_nK, double_nK = self._choose(tokens)
        roles = tokens.student_logprobs_nV, tokens.teacher_logprobs_nV
        student_nK, teacher_nK = (
            logprobs_nV.gather(1, index_nK).masked_fill(double_nK, IMPOSSIBLE) for logprobs_nV in roles
        )
        if self.settings.rest != "tail":
            if self.settings.rest == "renormalise":
                student_nK, teacher_nK = student_nK.log_softmax(dim=1), teacher_nK.log_softmax(dim=1)
            return AlignedTokens(student_nK, teacher_nK, None, right_n=tokens.right_n), index_nK
        # The sampled token's column is K, the tail's, where it was not chosen.
        is_here_nK = (index_nK == tokens.target_ids_n.unsqueeze(1)) & ~double_nK
        column_n = is_here_nK.int().argmax(dim=1).masked_fill(~is_here_nK.any(dim=1), index_nK.shape[1])
        student_tail_n1, teacher_tail_n1 = (
            logprobs_nV.scatter(1, index_nK, -float("inf")).logsumexp(dim=1, keepdim=True).clamp(min=IMPOSSIBLE)
            for logprobs_nV in roles
        )
        student_nK1 = cat([student_nK, student_tail_n1], dim=1)
        teacher_nK1 = cat([teacher_nK, teacher_tail_n1], dim=1)
        return AlignedTokens(student_nK1, teacher_nK1, column_n, right_n=tokens.right_n), index_nK

    def _choose(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        """Ids of the chosen tokens [n, K], and which of them stand there a second time."""
        from torch import cat

        k, side = self.settings.k, self.settings.side
        roles = {"teacher": tokens.teacher_logprobs_nV, "student": tokens.student_logprobs_nV}
        chosen = [roles[role].topk(k, dim=1).indices for role in (roles if side == "union" else [side])]
        index_nK = cat(chosen, dim=1)
        double_nK = index_nK.new_zeros(index_nK.shape).bool()
        if side == "union":
            # [n, k, k] comparisons: k is at most some hundreds, V is not.
            double_nK[:, k:] = (chosen[1].unsqueeze(2) == chosen[0].unsqueeze(1)).any(dim=2)
        return index_nK, double_nK

    def _renormalised(self, tokens: AlignedTokens, few: AlignedTokens, index_nK: Tensor) -> tuple[Tensor, Tensor]:
        """softmax over the k student logits: their gradient is that of the small problem, all others get none."""
        value_n, gradient_nK = self.base.value_and_gradient(few)
        everywhere_nV = tokens.student_logprobs_nV.new_zeros(tokens.student_logprobs_nV.shape)
        return value_n, everywhere_nV.scatter_add_(1, index_nK, gradient_nK)

    def _with_tail(self, tokens: AlignedTokens, few: AlignedTokens, index_nK: Tensor) -> tuple[Tensor, Tensor]:
        """The tail's logit is the logsumexp of the rest, so its gradient is shared out by their probabilities."""
        value_n, gradient_nK1 = self.base.value_and_gradient(few)
        # d logsumexp(rest) / d logit = softmax over the rest, which is p / p(tail) there. Chosen columns are set to 0
        # first, then given their own gradient.
        student_tail_n1 = few.student_logprobs_nV[:, -1:]
        rest_nV = gradient_nK1[:, -1:] * (tokens.student_logprobs_nV - student_tail_n1).exp()
        rest_nV = rest_nV.scatter(1, index_nK, 0.0)
        return value_n, rest_nV.scatter_add_(1, index_nK, gradient_nK1[:, :-1])

    def _dropped(self, tokens: AlignedTokens, few: AlignedTokens, index_nK: Tensor) -> tuple[Tensor, Tensor]:
        assert is_sum_of_entries(self.base)
        # The entries of the small problem keep the full normaliser, so the step through the softmax is that of the
        # whole vocabulary: g - p * sum(g), with g = 0 outside the chosen tokens.
        contribution_nK, gradient_nK = self.base.entries(few)
        through_nV = -tokens.student_probs_nV * gradient_nK.sum(dim=1, keepdim=True)
        return contribution_nK.sum(dim=1), through_nV.scatter_add_(1, index_nK, gradient_nK)
