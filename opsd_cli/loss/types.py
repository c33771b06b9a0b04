"""The types of the loss: an output head as numbers, hidden states that belong to one, mixtures of passes, and what
becomes of them. Apart from the functions, because engine, teachers and training speak in these types too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from opsd_cli.cpu.matmul import linear_into

if TYPE_CHECKING:
    from opsd_cli.data.pairing import PairedBatch


@dataclass(frozen=True)
class Head:
    """An output head as numbers: logits = cap(scale * (hidden @ weight.T + bias)), cap(z) = c * tanh(z / c)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Logits [n, V], at least fp32."""
        hidden_nD = hidden_nD.to(self.weight_VD.dtype)
        return self.transformed(torch.nn.functional.linear(hidden_nD, self.weight_VD, self.bias_V))

    def product(self, hidden_nD: Tensor, out_nV: Tensor) -> None:
        """hidden @ weight.T + bias, written to `out_nV`, whose type is the weight's or fp32."""
        # `out=` would resize a buffer of another shape, silently, and what reads it would take its rows elsewhere.
        shape = (len(hidden_nD), len(self.weight_VD))
        assert out_nV.shape == shape, f"a product of shape {shape} does not fit a buffer of {tuple(out_nV.shape)}"
        linear_into(out_nV, hidden_nD.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)

    def transformed(self, raw_nV: Tensor) -> Tensor:
        """Logits, at least fp32, from the raw product; the product itself where there is nothing to do."""
        logits_nV = raw_nV.to(torch.promote_types(raw_nV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        return logits_nV if self.softcap is None else self.softcap * torch.tanh(logits_nV / self.softcap)

    def back_to_raw(self, gradient_nV: Tensor, logits_nV: Tensor) -> Tensor:
        """Carry a gradient with respect to `logits` back to hidden @ weight.T + bias."""
        # d/dz of c * tanh(z / c) is 1 - tanh^2, and the logits hold c * tanh already.
        if self.softcap is not None:
            gradient_nV = gradient_nV * (1.0 - (logits_nV / self.softcap).square())
        return gradient_nV if self.scale == 1.0 else gradient_nV * self.scale

    def first_rows(self, rows: int) -> Head:
        """The head over the first `rows` tokens: another model may have rows beyond, for no token of its tokenizer."""
        if rows == len(self.weight_VD):
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:rows]
        return replace(self, weight_VD=self.weight_VD[:rows], bias_V=bias_V)

    def detached(self, *, copy: bool) -> Head:
        """The same head without gradient; with `copy` it outlives a module call after which ZeRO-3 frees its weight."""

        def detach(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if copy else tensor.data

        bias_V = None if self.bias_V is None else detach(self.bias_V)
        return Head(detach(self.weight_VD), bias_V, self.scale, self.softcap)


@dataclass(frozen=True)
class TokenScores:
    """Hidden states at N aligned positions [N, D], and the head that belongs to the weights that made them: None where
    it is the student's own, which is used, unchanged, in the same step."""

    hidden_ND: Tensor
    head: Head | None

    def weighted(self, weight: float) -> tuple[tuple[float, TokenScores], ...]:
        """This pass as a part of a mixture."""
        return ((weight, self),)


@dataclass(frozen=True)
class TokenMixture:
    """A target made of several passes: log q = log_softmax(sum of weight * log-probabilities), where the student's own
    distribution, held constant, may be one of them. Weights need not sum to 1, nor be positive. With `in_probabilities`
    the mixture is of probabilities, q = sum of weight * q_i, with positive weights that sum to 1."""

    parts: tuple[tuple[float, TokenScores], ...]
    student_weight: float = 0.0
    in_probabilities: bool = False

    def weighted(self, weight: float) -> tuple[tuple[float, TokenScores], ...]:
        """The parts of this mixture as parts of another."""
        return tuple((weight * share, scores) for share, scores in self.parts)


class TokenLoss(NamedTuple):
    """The objective of one micro-batch: its weighted sum (carries the gradient), its value per token, and what is
    logged about every token whatever is optimised. A tuple, so that DeepSpeed's hooks find the tensors in it."""

    weighted_sum: Tensor  # scalar
    value_N: Tensor
    diagnostics: dict[str, Tensor]  # name -> [N], no gradient


class ComputesLoss(Protocol):
    """From the student's hidden states and head, whole, to the loss of a micro-batch: `chunked_head.Objective`."""

    def __call__(
        self, student_ND: Tensor, head: Head, *, batch: PairedBatch, target: TokenScores | TokenMixture | None
    ) -> TokenLoss: ...


@dataclass(frozen=True)
class Work:
    """Floating-point operations that passes needed, and those that gradient checkpointing made once more."""

    flops: float
    repeated: float


@dataclass(frozen=True)
class Update:
    """One optimizer update: the learning rate used, the global gradient norm before clipping and how far the weights
    moved. `refused` says what was not finite; the weights are then as before. So they are after an `overflow`, in
    float16 only: the same update can be made again, at half the scale of the loss."""

    lr: float
    grad_norm: float
    refused: Literal["", "loss", "gradient"] = ""
    overflow: bool = False
    update_norm: float = 0.0  # of the weights after it minus those before
    loss_scale: float | None = None  # that the gradient was made at, in float16
