"""From two sets of hidden states to one objective, exact over the full vocabulary, never holding [N, V].

Owns the output head, the chunks, the two products with its weight and the gradient. Does not know where the hidden
states came from, nor how the sum is normalised; what lies between the two products is in `blocks` and `kernels`.

The work is done once, going forwards: for each chunk of n tokens the raw products of both roles are made, value and
gradient with respect to the student's product replace it in place, and that gradient is carried through the head at
once. So backward is a multiplication, nothing is recomputed, and the teacher is held as [N, D] hidden states. The
head runs as one module call whatever the number of chunks, which is what ZeRO-3 needs (ranks may have different N).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from opsd_cli.cpu.matmul import back
from opsd_cli.loss.divergences import Divergence
from opsd_cli.loss.torch_rows import RowBlocks
from opsd_cli.loss.triton_dispatch import fused_rows
from opsd_cli.loss.types import Factor, Head, Job, Notes, TokenLoss, TokenMixture, TokenScores

__all__ = ["Factor", "Head", "TokenLoss", "TokenMixture", "TokenScores", "distill"]

TILE = 8192  # rows of a half-precision head whose gradient is added in fp32 at a time


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
    wide_logits: bool = False,
) -> TokenLoss:
    """Sum over tokens of weight times divergence between the two next-token distributions.

    Both logits are divided by `temperature` first. `chunk_bytes` bounds the raw products that are alive at once, those
    of all passes together; what is computed from them adds little on a CPU (blocks of rows) and at most about as much
    again on a GPU. `teacher` is None for a divergence that needs none. `factors` scale a token's value and gradient by
    a constant that depends on both distributions (gates, importance weights). `wide_logits` makes the logits of a
    half-precision head in fp32 (bfloat16 holds a logit of 20 to within 0.06); the gradient is rounded to the head's
    type before its products either way. Gradient flows to `student_ND` and, where they are trainable, to the head's
    weight and bias; never to the teacher.
    """
    job = Job(
        student_head, teacher, target_ids_N, weights_N, divergence, temperature, chunk_bytes, factors, wide_logits
    )
    diagnostics: dict[str, Tensor] = {}
    weighted_sum, value_N = _FusedHead.apply(student_ND, student_head.weight_VD, student_head.bias_V, job, diagnostics)
    return TokenLoss(weighted_sum=weighted_sum, value_N=value_N, diagnostics=diagnostics)


class _FusedHead(torch.autograd.Function):
    """Head and divergence in one differentiable step whose gradient is computed going forwards."""

    @staticmethod
    def forward(ctx, student_ND, weight_VD, bias_V, job, diagnostics):  # type: ignore[no-untyped-def]
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        gradients = _Gradients(student_ND, job.head, needs_weight=needs_weight, needs_bias=needs_bias)
        notes = _run_chunks(student_ND, job, gradients)
        diagnostics.update(notes.diagnostics)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(notes.value_N)
        return (notes.value_N * job.weights_N).sum(), notes.value_N

    @staticmethod
    def backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
        gradients = ctx.gradients
        del ctx.gradients  # scaled in place: a second backward through the same node must fail, not be wrong
        return (*gradients.scaled(upstream), None, None)


class Middle(Protocol):
    """What happens between the two products with the head: `RowBlocks` or `FusedRows`."""

    def __call__(self, raw_RnV: Tensor, chunk: slice, notes: Notes) -> None:
        """Note value and diagnostics of a chunk; replace the student's raw product, raw_RnV[0], by the gradient."""


def _run_chunks(student_ND: Tensor, job: Job, gradients: _Gradients) -> Notes:
    """Values, diagnostics and gradients of every token, one chunk after another."""
    weight_VD, roles = job.head.weight_VD, len(job.heads)
    notes = Notes(torch.empty_like(job.weights_N), job.weights_N / job.temperature)
    middle = middle_of(job)
    row_bytes = roles * len(weight_VD) * job.logits_dtype.itemsize
    slices = list(chunks(len(student_ND), size=job.chunk_bytes // row_bytes))
    # One allocation for all chunks: fresh pages cost about as much time as a whole pass over them.
    rows_at_most = max((chunk.stop - chunk.start for chunk in slices), default=0)
    room = weight_VD.new_empty(roles * len(weight_VD) * rows_at_most, dtype=job.logits_dtype)
    for chunk in slices:
        rows = chunk.stop - chunk.start
        raw_RnV = room[: roles * rows * len(weight_VD)].view(roles, rows, len(weight_VD))
        _make_products(student_ND, job, chunk, raw_RnV)
        middle(raw_RnV, chunk, notes)
        gradients.add(student_ND, raw_RnV[0], notes.scale_N[chunk].unsqueeze(1), chunk)
    return notes


def middle_of(job: Job) -> Middle:
    """A kernel that does it in one go where there is one, blocks of rows in plain PyTorch otherwise."""
    return fused_rows(job) or RowBlocks(job)


def _make_products(student_ND: Tensor, job: Job, chunk: slice, raw_RnV: Tensor) -> None:
    """The raw products of all passes; in one product where they share a head, which then is read once."""
    hidden = [student_ND[chunk], *(scores.hidden_ND[chunk] for scores in job.passes)]
    if all(scores.head is None for scores in job.passes):
        job.head.product(torch.cat(hidden), raw_RnV.view(-1, raw_RnV.shape[2]))
        return
    for head, hidden_nD, raw_nV in zip(job.heads, hidden, raw_RnV, strict=True):
        head.product(hidden_nD, raw_nV)


class _Gradients:
    """What the chunks add up to: gradients of the student's hidden states and, where asked for, of the head. Held in
    fp32 at least and rounded once, after the scale of the loss: a factor common to all tokens, which rounded to half
    precision would change the learning rate, and without which gradients may be too small for float16."""

    def __init__(self, student_ND: Tensor, head: Head, *, needs_weight: bool, needs_bias: bool) -> None:
        self.weight_VD, self.bias_V = head.weight_VD, head.bias_V
        self.dtype = student_ND.dtype
        wide = torch.promote_types(head.weight_VD.dtype, torch.float32)
        self.hidden_ND = torch.empty_like(student_ND, dtype=torch.promote_types(student_ND.dtype, torch.float32))
        self.of_weight_VD = torch.zeros_like(head.weight_VD, dtype=wide) if needs_weight else None
        self.of_bias_V = torch.zeros_like(head.bias_V, dtype=wide) if needs_bias and head.bias_V is not None else None

    def add(self, student_ND: Tensor, gradient_nV: Tensor, scale_n1: Tensor, chunk: slice) -> None:
        """`gradient_nV` times `scale_n1` is the gradient of the raw product; the scale goes on the narrow side."""
        gradient_nV = gradient_nV.to(self.weight_VD.dtype)
        self.hidden_ND[chunk] = back(gradient_nV, self.weight_VD) * scale_n1
        if self.of_bias_V is not None:
            self.of_bias_V += gradient_nV.T @ scale_n1.squeeze(1).to(gradient_nV.dtype)
        if self.of_weight_VD is not None:
            hidden_nD = (student_ND[chunk] * scale_n1).to(gradient_nV.dtype)
            add_product(self.of_weight_VD, gradient_nV, hidden_nD)

    def scaled(self, upstream: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All of them times `upstream`, in the types of what they belong to. To be called once."""

        def scale(wide: Tensor, dtype: torch.dtype) -> Tensor:
            return wide.mul_(upstream.to(wide.dtype)).to(dtype)

        of_weight_VD, of_bias_V = self.of_weight_VD, None
        if self.of_bias_V is not None and self.bias_V is not None:
            of_bias_V = scale(self.of_bias_V, self.bias_V.dtype)
        if of_weight_VD is not None:
            of_weight_VD = scale(of_weight_VD, self.weight_VD.dtype)
        return scale(self.hidden_ND, self.dtype), of_weight_VD, of_bias_V


def add_product(total_VD: Tensor, left_nV: Tensor, right_nD: Tensor) -> None:
    """total += left.T @ right, in place; half-precision products are made a tile at a time and added in fp32."""
    if total_VD.dtype == left_nV.dtype:
        total_VD.addmm_(left_nV.T, right_nD)
        return
    for start in range(0, len(total_VD), TILE):
        total_VD[start : start + TILE] += left_nV[:, start : start + TILE].T @ right_nD


def chunks(rows: int, *, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows, and at least one, of nearly equal length."""
    count = -(-rows // max(1, size))
    return (slice(rows * i // count, rows * (i + 1) // count) for i in range(count))
