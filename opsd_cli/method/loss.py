"""From two sets of hidden states to one objective, exact over the full vocabulary, never holding [N, V].

Owns the chunking, the temperature, the diagnostics and the closed-form gradient of the output head. Does not know
where the hidden states came from, which divergence it is given, or how the sum is normalised.

The work is done once, going forwards: for each chunk of n tokens the logits of both roles are made, the divergence
gives value and gradient with respect to the student's logits, and that gradient is carried through the head at once.
So backward is a multiplication, nothing is recomputed, and the teacher is held as [N, D] hidden states. The head runs
as one module call whatever the number of chunks, which is what ZeRO-3 needs (ranks may have different N).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from opsd_cli.method.divergence import AlignedTokens, Divergence, inner


@dataclass(frozen=True)
class Head:
    """An output head as numbers: logits = cap(scale * (hidden @ weight.T + bias)), cap(z) = c * tanh(z / c)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Logits [n, V], at least fp32."""
        raw_nV = torch.nn.functional.linear(hidden_nD.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)
        logits_nV = at_least_float32(raw_nV)
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        return logits_nV if self.softcap is None else self.softcap * torch.tanh(logits_nV / self.softcap)

    def kept(self, *, copy: bool) -> Head:
        """The same head without gradient; with `copy` it outlives a module call after which ZeRO-3 frees its weight."""

        def keep(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if copy else tensor.data

        bias_V = None if self.bias_V is None else keep(self.bias_V)
        return Head(keep(self.weight_VD), bias_V, self.scale, self.softcap)

    def back_to_raw(self, gradient_nV: Tensor, logits_nV: Tensor) -> Tensor:
        """Carry a gradient with respect to `logits` back to hidden @ weight.T + bias."""
        if self.softcap is not None:
            gradient_nV = gradient_nV * (1.0 - (logits_nV / self.softcap).square())
        return gradient_nV if self.scale == 1.0 else gradient_nV * self.scale


@dataclass(frozen=True)
class TokenScores:
    """Hidden states at N aligned positions [N, D], and the head that belongs to the weights that made them.

    `head` is None where that head is the student's own, which is used, unchanged, in the same step.
    """

    hidden_ND: Tensor
    head: Head | None


@dataclass(frozen=True)
class TokenMixture:
    """A target made of several passes: log q = log_softmax(sum of weight * log-probabilities), where the student's own
    distribution, held constant, may be one of them. Weights need not sum to 1, nor be positive."""

    parts: tuple[tuple[float, TokenScores], ...]
    student_weight: float = 0.0


@dataclass(frozen=True)
class TokenLoss:
    """The objective of one micro-batch: its weighted sum (carries the gradient), its value per token, and what is
    logged about every token whatever is optimised."""

    weighted_sum: Tensor  # scalar
    value_N: Tensor
    diagnostics: dict[str, Tensor]  # name -> [N], no gradient


class Factor(Protocol):
    """A constant factor for each token of a chunk, and the name under which its mean is reported."""

    name: str

    def __call__(self, tokens: AlignedTokens, chunk: slice) -> Tensor: ...


@dataclass(frozen=True)
class _Job:
    """Everything of one micro-batch that is not differentiated."""

    head: Head
    teacher: TokenScores | TokenMixture | None
    target_ids_N: Tensor
    weights_N: Tensor
    divergence: Divergence
    temperature: float
    chunk_bytes: int
    factors: tuple[Factor, ...]


@dataclass
class _Result:
    """What the chunk loop fills in."""

    value_N: Tensor
    gradient_ND: Tensor
    gradient_VD: Tensor | None
    gradient_V: Tensor | None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


def distill(
    student_ND: Tensor,
    student_head: Head,
    *,
    teacher: TokenScores | TokenMixture | None,
    target_ids_N: Tensor,
    weights_N: Tensor,
    divergence: Divergence,
    temperature: float,
    chunk_bytes: int,
    factors: tuple[Factor, ...] = (),
) -> TokenLoss:
    """Sum over tokens of weight times divergence between the two next-token distributions.

    Both logits are divided by `temperature` first. `chunk_bytes` bounds one [n, V] tensor; about eight are alive at
    once. `teacher` is None for a divergence that needs none. `factors` scale a token's value and gradient by a constant
    that depends on both distributions (gates, importance weights). Gradient flows to `student_ND` and, where they are
    trainable, to the head's weight and bias; never to the teacher.
    """
    job = _Job(student_head, teacher, target_ids_N, weights_N, divergence, temperature, chunk_bytes, factors)
    diagnostics: dict[str, Tensor] = {}
    weighted_sum, value_N = _FusedHead.apply(student_ND, student_head.weight_VD, student_head.bias_V, job, diagnostics)
    return TokenLoss(weighted_sum=weighted_sum, value_N=value_N, diagnostics=diagnostics)


class _FusedHead(torch.autograd.Function):
    """Head and divergence in one differentiable step whose gradient is computed going forwards."""

    @staticmethod
    def forward(ctx, student_ND, weight_VD, bias_V, job, diagnostics):  # type: ignore[no-untyped-def]
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        result = _run_chunks(student_ND, job, needs_weight=needs_weight, needs_bias=needs_bias)
        diagnostics.update(result.diagnostics)
        ctx.gradients = (result.gradient_ND, result.gradient_VD, result.gradient_V)
        ctx.mark_non_differentiable(result.value_N)
        return (result.value_N * job.weights_N).sum(), result.value_N

    @staticmethod
    def backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
        gradients = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in ctx.gradients]
        del ctx.gradients  # scaled in place: a second backward through the same node must fail, not be wrong
        return (*gradients, None, None)


def _run_chunks(student_ND: Tensor, job: _Job, *, needs_weight: bool, needs_bias: bool) -> _Result:
    """Values, diagnostics and gradients of every token, one chunk after another."""
    head, weight_VD, bias_V = job.head, job.head.weight_VD, job.head.bias_V
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    result = _Result(
        value_N=torch.empty_like(job.weights_N),
        gradient_ND=torch.empty_like(student_ND),
        gradient_VD=torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None,
        gradient_V=torch.zeros_like(bias_V, dtype=wide) if needs_bias and bias_V is not None else None,
    )
    for chunk in chunks(len(student_ND), vocabulary=len(weight_VD), chunk_bytes=job.chunk_bytes):
        hidden_nD = student_ND[chunk].to(weight_VD.dtype)
        logits_nV = head.logits(hidden_nD)
        tokens = _align(logits_nV, job, chunk)
        value_n, gradient_nV = job.divergence.value_and_gradient(tokens)
        diagnostics = describe(tokens, with_teacher=job.teacher is not None)
        weights_n = job.weights_N[chunk]
        for factor in job.factors:
            factor_n = factor(tokens, chunk)
            diagnostics[factor.name] = factor_n
            value_n, weights_n = value_n * factor_n, weights_n * factor_n
        result.value_N[chunk] = value_n
        for name, value_n in diagnostics.items():
            result.diagnostics.setdefault(name, torch.empty_like(job.weights_N))[chunk] = value_n
        gradient_nV = gradient_nV * (weights_n / job.temperature).unsqueeze(1)
        gradient_nV = head.back_to_raw(gradient_nV, logits_nV).to(weight_VD.dtype)
        result.gradient_ND[chunk] = (gradient_nV @ weight_VD).to(student_ND.dtype)
        if result.gradient_VD is not None:
            result.gradient_VD += gradient_nV.T @ hidden_nD
        if result.gradient_V is not None:
            result.gradient_V += gradient_nV.sum(dim=0)
    if result.gradient_VD is not None:
        result.gradient_VD = result.gradient_VD.to(weight_VD.dtype)
    if result.gradient_V is not None and bias_V is not None:
        result.gradient_V = result.gradient_V.to(bias_V.dtype)
    return result


def _align(student_logits_nV: Tensor, job: _Job, chunk: slice) -> AlignedTokens:
    """Both distributions of one chunk. Without a teacher the student stands in for it: every ratio is then zero."""
    student_nV = (student_logits_nV / job.temperature).log_softmax(dim=1)
    if job.teacher is None:
        teacher_nV = student_nV
    elif isinstance(job.teacher, TokenScores):
        teacher_nV = _logprobs(job.teacher, job, chunk)
    else:
        mixed_nV = job.teacher.student_weight * student_nV
        for weight, scores in job.teacher.parts:
            mixed_nV = mixed_nV + weight * _logprobs(scores, job, chunk)
        teacher_nV = mixed_nV.log_softmax(dim=1)
    return AlignedTokens(student_nV, teacher_nV, job.target_ids_N[chunk])


def _logprobs(scores: TokenScores, job: _Job, chunk: slice) -> Tensor:
    """Log-probabilities [n, V] of one pass."""
    head = scores.head or job.head
    return (head.logits(scores.hidden_ND[chunk]) / job.temperature).log_softmax(dim=1)


def describe(tokens: AlignedTokens, *, with_teacher: bool) -> dict[str, Tensor]:
    """What is logged about every token whatever the divergence is, so that runs can be compared. Each [n], nats."""
    diagnostics = {"entropy/student": -inner(tokens.student_probs_nV, tokens.student_logprobs_nV)}
    if with_teacher:
        same_n = tokens.student_logprobs_nV.argmax(dim=1) == tokens.teacher_logprobs_nV.argmax(dim=1)
        diagnostics |= {
            "entropy/teacher": -inner(tokens.teacher_probs_nV, tokens.teacher_logprobs_nV),
            "kl/forward": tokens.forward_kl_n,
            "kl/reverse": tokens.reverse_kl_n,
            "agree/top1": same_n.to(tokens.student_logprobs_nV.dtype),
        }
    return diagnostics


def chunks(rows: int, *, vocabulary: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of at most so many rows that one fp32 [n, V] tensor stays within `chunk_bytes` (at least one row)."""
    step = max(1, chunk_bytes // (4 * vocabulary))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def at_least_float32(values: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
