"""The Rényi divergence, a family with one knob that holds the forward KL. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.divergences import ByValue
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from torch import Tensor


@plugin("divergence", "renyi")
class Renyi(ByValue):
    """log(sum q^order * p^(1 - order)) / (order - 1): the forward KL at order 1 (SR-OPSD, 2608.09745).

    Below 1 it leans towards what both find likely, above 1 it weighs what the student finds too unlikely more. The
    gradient is p - w with w ~ q^order * p^(1 - order), another distribution, so it is bounded whatever the order.
    """

    order: Annotated[float, Field(gt=0)]

    def value(self, tokens: AlignedTokens) -> Tensor:
        if self.order == 1.0:
            return tokens.forward_kl_n
        return self._exponents(tokens).logsumexp(dim=1) / (self.order - 1.0)

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        if self.order == 1.0:
            return tokens.forward_kl_n, tokens.student_probs_nV - tokens.teacher_probs_nV
        exponents_nV = self._exponents(tokens)
        value_n = exponents_nV.logsumexp(dim=1) / (self.order - 1.0)
        return value_n, tokens.student_probs_nV - exponents_nV.softmax(dim=1)

    def _exponents(self, tokens: AlignedTokens) -> Tensor:
        """log(q^order * p^(1 - order)), [n, V]."""
        return self.order * tokens.teacher_logprobs_nV + (1.0 - self.order) * tokens.student_logprobs_nV
