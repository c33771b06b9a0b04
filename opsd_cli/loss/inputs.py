"""What the rows of a chunk are computed from, and what they are written to, in plain PyTorch and by the kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from opsd_cli.loss.divergences import AlignedTokens, Divergence
from opsd_cli.loss.types import Head, TokenMixture, TokenScores


class Factor(Protocol):
    """A constant factor for each token of a chunk, and the name under which its mean is reported."""

    name: str

    def __call__(self, tokens: AlignedTokens, chunk: slice) -> Tensor: ...


@dataclass(frozen=True)
class LossInputs:
    """Everything of one micro-batch that is not differentiated."""

    head: Head
    teacher: TokenScores | TokenMixture | None
    target_ids_N: Tensor
    weights_N: Tensor
    divergence: Divergence
    temperature: float
    chunk_bytes: int
    factors: tuple[Factor, ...]
    wide_logits: bool

    @property
    def logits_dtype(self) -> torch.dtype:
        """The type the raw products are made in: the head's own, unless wider ones were asked for."""
        own = self.head.weight_VD.dtype
        return torch.promote_types(own, torch.float32) if self.wide_logits else own

    @property
    def mixture(self) -> TokenMixture | None:
        """The target as a mixture, where it is one."""
        return self.teacher if isinstance(self.teacher, TokenMixture) else None

    @property
    def passes(self) -> tuple[TokenScores, ...]:
        """The passes that the target is made of."""
        if isinstance(self.teacher, TokenMixture):
            return tuple(scores for _, scores in self.teacher.parts)
        return () if self.teacher is None else (self.teacher,)

    @property
    def heads(self) -> tuple[Head, ...]:
        """One for each raw product: the student's, then those of the passes."""
        return (self.head, *(scores.head or self.head for scores in self.passes))


@dataclass
class TokenRecords:
    """What is known of every token once its chunk is done, written chunk by chunk."""

    value_N: Tensor
    scale_N: Tensor  # weight and factors, over the temperature: what multiplies the gradient
    diagnostics: dict[str, Tensor] = field(default_factory=dict)

    def write(self, rows: slice, value_n: Tensor, diagnostics: dict[str, Tensor]) -> None:
        self.value_N[rows] = value_n
        for name, described_n in diagnostics.items():
            self.diagnostics.setdefault(name, torch.empty_like(self.value_N))[rows] = described_n
