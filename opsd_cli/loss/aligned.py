"""Two aligned distributions over the vocabulary at some tokens: what a divergence, a clip, a support and a token rule
are functions of. Importing it does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from opsd_cli.settings.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AlignedTokens:
    """The two distributions at n aligned tokens, as log-probabilities [n, V], and the column of each sampled token [n].

    Over the whole vocabulary that column is the token's id. Over a part of it (`loss.support`) V is the number of
    outcomes, and `sampled_n` is None where the sampled token may be in none of them. Everything that several
    divergences and the diagnostics share is computed once, on first use; the probabilities may be given where the
    log-probabilities were made from them.
    """

    student_logprobs_nV: Tensor
    teacher_logprobs_nV: Tensor
    sampled_n: Tensor | None
    given_student_nV: Tensor | None = None
    given_teacher_nV: Tensor | None = None
    right_n: Tensor | None = None  # bool: the completion has the right answer; None where nothing asks

    @cached_property
    def student_probs_nV(self) -> Tensor:
        return self.student_logprobs_nV.exp() if self.given_student_nV is None else self.given_student_nV

    @cached_property
    def teacher_probs_nV(self) -> Tensor:
        return self.teacher_logprobs_nV.exp() if self.given_teacher_nV is None else self.given_teacher_nV

    @cached_property
    def log_ratio_nV(self) -> Tensor:
        """log q - log p."""
        return self.teacher_logprobs_nV - self.student_logprobs_nV

    @cached_property
    def forward_kl_n(self) -> Tensor:
        """KL(teacher || student)."""
        return rowwise_dot(self.teacher_probs_nV, self.log_ratio_nV)

    @cached_property
    def reverse_kl_n(self) -> Tensor:
        """KL(student || teacher)."""
        return -rowwise_dot(self.student_probs_nV, self.log_ratio_nV)

    @cached_property
    def student_entropy_n(self) -> Tensor:
        return -rowwise_dot(self.student_probs_nV, self.student_logprobs_nV)

    @cached_property
    def teacher_entropy_n(self) -> Tensor:
        return -rowwise_dot(self.teacher_probs_nV, self.teacher_logprobs_nV)

    @property
    def target_ids_n(self) -> Tensor:
        """The column of the sampled token. Raises ConfigError where the chosen support may leave that token out."""
        if self.sampled_n is None:
            raise ConfigError(
                "support.rest=renormalise and support.rest=drop may leave out the sampled token, which this divergence "
                "looks at; use support.rest=tail or support=full"
            )
        return self.sampled_n

    def at_target(self, values_nV: Tensor) -> Tensor:
        """The entry of the sampled token, [n]. Raises ConfigError as `target_ids_n` does."""
        return values_nV.gather(1, self.target_ids_n.unsqueeze(1)).squeeze(1)


def rowwise_dot(left_nV: Tensor, right_nV: Tensor) -> Tensor:
    return (left_nV * right_nV).sum(dim=1)


def through_softmax(gradient_nV: Tensor, probs_nV: Tensor) -> Tensor:
    """From a gradient with respect to log-probabilities to one with respect to logits: g - p * sum(g)."""
    return gradient_nV - probs_nV * gradient_nV.sum(dim=1, keepdim=True)


def measure(name: str, tokens: AlignedTokens) -> Tensor:
    """What a token is routed or gated by, [n].

    student_entropy, teacher_entropy: of that role's distribution, nats
    entropy_gap: the student's entropy minus the teacher's, nats
    privilege: log q(y) - log p(y) of the sampled token: how far the context supports what was said, nats
    right_answer: 1 for a token of a completion with the right answer, else 0
    """
    if name == "right_answer":
        assert tokens.right_n is not None, "the batch does not say which completions are right"
        return tokens.right_n.to(tokens.student_logprobs_nV.dtype)
    if name == "privilege":
        return tokens.at_target(tokens.log_ratio_nV)
    if name == "entropy_gap":
        return tokens.student_entropy_n - tokens.teacher_entropy_n
    return {"student_entropy": tokens.student_entropy_n, "teacher_entropy": tokens.teacher_entropy_n}[name]
