"""From two sets of hidden states to one objective, exact over the full vocabulary, never holding [N, V].

The work is done once, going forwards: for each chunk of n tokens the raw products of both roles are computed, value and
gradient with respect to the student's product replace it in place, and that gradient is carried through the head at
once. So backward is a multiplication, nothing is recomputed, and the teacher is held as [N, D] hidden states. The
head runs as one module call whatever the number of chunks, which is what ZeRO-3 needs (ranks may have different N).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_cli.cpu.matmul import back
from opsd_cli.data.pairing import PairedBatch
from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.by_value import check_closed_form
from opsd_cli.loss.chunk_rows import LossInputs, TokenRecords, torch_rows, triton_rows, triton_takes
from opsd_cli.loss.clip import apply_clip
from opsd_cli.loss.divergences import Divergence
from opsd_cli.loss.support import restrict_support
from opsd_cli.loss.token_factors import factors_of
from opsd_cli.loss.types import Head, TokenLoss, TokenMixture, TokenScores
from opsd_cli.settings.config import Config, SupportSettings, TokenSettings
from opsd_cli.settings.errors import ConfigError

TRIED_TOKENS = 3
CPU = torch.device("cpu")
LEAST_CHUNK = 256  # MiB, where nothing is asked for
PART_OF_CARD = 64  # larger chunks read the head less often: on an H100 the loss takes 1.3 times its products, not 1.5
TILE = 8192  # rows of a half-precision head whose gradient is added in fp32 at a time


@dataclass(frozen=True)
class Objective:
    """What is minimised at every token of a run, from hidden states to a `TokenLoss`."""

    divergence: Divergence  # over its support and with its clip
    tokens: TokenSettings
    importance_cap: float | None
    temperature: float
    chunk_bytes: int
    wide_logits: bool

    @staticmethod
    def of(config: Config, device: torch.device = CPU) -> Objective:
        """As the settings say, for models on `device`. Raises ConfigError where divergence, clip and support do not
        fit."""
        return Objective(
            restrict_support(apply_clip(config.divergence, config.clip), config.support),
            config.tokens,
            config.loss.importance_cap,
            temperature=config.loss.temperature,
            chunk_bytes=chunk_bytes(config.loss.chunk_mib, device),
            wide_logits=config.loss.logits_dtype == "float32",
        )

    def __call__(
        self, student_ND: Tensor, head: Head, *, batch: PairedBatch, target: TokenScores | TokenMixture | None
    ) -> TokenLoss:
        """The loss of a micro-batch; `head` is the student's, whole."""
        inputs = LossInputs(
            head,
            target,
            batch.target_ids_N,
            batch.weights_N,
            self.divergence,
            temperature=self.temperature,
            chunk_bytes=self.chunk_bytes,
            factors=factors_of(self.tokens, batch, importance_cap=self.importance_cap),
            wide_logits=self.wide_logits,
            right_N=batch.right_N,
        )
        return distill(student_ND, inputs)


def chunk_bytes(asked_mib: int | None, device: torch.device) -> int:
    """How much the products of a chunk may take: what is asked for, else what suits the device."""
    if asked_mib is not None:
        return asked_mib * 2**20
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(LEAST_CHUNK * 2**20, card // PART_OF_CARD)


def try_out(divergence: Divergence, *, name: str, support: SupportSettings) -> None:
    """Try a divergence, with its support and clip, on a few random tokens, before a model is loaded. Raises ConfigError
    when it looks at what the support leaves out, returns anything but finite values [n] and gradients [n, V], or has a
    closed form that is not that of the `value` beside it."""
    vocabulary = 2 * support.k + 8  # more than any choice of k tokens of both roles, so that there is a rest
    generator = torch.Generator().manual_seed(0)
    student_nV, teacher_nV = torch.randn(2, TRIED_TOKENS, vocabulary, generator=generator).log_softmax(dim=2)
    sampled_n = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    right_n = torch.tensor([True, False, True])
    tokens = AlignedTokens(student_nV, teacher_nV, sampled_n, right_n=right_n)
    try:
        value_n, gradient_nV = divergence.value_and_gradient(tokens)
        check_closed_form(divergence)
    except ConfigError as error:
        raise ConfigError(*(f"divergence={name}: {problem}" for problem in error.problems)) from None
    for what, made, shape in (
        ("value", value_n, (TRIED_TOKENS,)),
        ("gradient", gradient_nV, (TRIED_TOKENS, vocabulary)),
    ):
        if made.shape != shape:
            raise ConfigError(
                f"divergence={name}: the {what} of {TRIED_TOKENS} tokens over {vocabulary} entries has shape "
                f"{list(made.shape)}, which must be {list(shape)}"
            )
        if not bool(made.isfinite().all()):
            raise ConfigError(f"divergence={name}: the {what} of random distributions is not finite")


def distill(student_ND: Tensor, inputs: LossInputs) -> TokenLoss:
    """Sum over tokens of weight times divergence between the two next-token distributions.

    What is computed from the raw products of a chunk adds little to them on a CPU (blocks of rows) and at most about as
    much again on a GPU. The gradient is rounded to the head's type before its products, also with `wide_logits`. It
    flows to `student_ND` and, where they are trainable, to the head's weight and bias; never to the teacher.
    """
    head, weights_N = inputs.head, inputs.weights_N
    with torch.no_grad():
        gradients = _Gradients(student_ND, head)
        records = _run_chunks(student_ND, inputs, gradients)
        weighted_sum = (records.value_N * weights_N).sum()
    weighted_sum = _WithGradients.apply(student_ND, head.weight_VD, head.bias_V, weighted_sum, gradients)
    return TokenLoss(weighted_sum=weighted_sum, value_N=records.value_N, diagnostics=records.diagnostics)


class _WithGradients(torch.autograd.Function):
    """A number whose gradients are known already: autograd only multiplies them by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any, student_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, value: Tensor, gradients: _Gradients
    ) -> Tensor:
        ctx.gradients = gradients
        # A new tensor: autograd would tie an input that is returned as it is to itself.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients  # scaled in place: a second backward through the same node must fail, not be wrong
        return (*gradients.scaled(upstream), None, None)


def _run_chunks(student_ND: Tensor, inputs: LossInputs, gradients: _Gradients) -> TokenRecords:
    """Values, diagnostics and gradients of every token, one chunk after another."""
    weight_VD, roles = inputs.head.weight_VD, len(inputs.heads)
    records = TokenRecords(torch.empty_like(inputs.weights_N), inputs.weights_N / inputs.temperature)
    compute_rows = triton_rows if triton_takes(inputs) else torch_rows
    row_bytes = roles * len(weight_VD) * inputs.logits_dtype.itemsize
    slices = list(chunks(len(student_ND), size=inputs.chunk_bytes // row_bytes))
    # One allocation for all chunks: fresh pages cost about as much time as a whole pass over them.
    rows_at_most = max((chunk.stop - chunk.start for chunk in slices), default=0)
    room = weight_VD.new_empty(roles * len(weight_VD) * rows_at_most, dtype=inputs.logits_dtype)
    for chunk in slices:
        rows = chunk.stop - chunk.start
        raw_RnV = room[: roles * rows * len(weight_VD)].view(roles, rows, len(weight_VD))
        _make_products(student_ND, inputs, chunk, raw_RnV)
        compute_rows(inputs, raw_RnV, chunk, records)
        # From here on raw_RnV[0] is the gradient of the student's product, not the product.
        gradients.add(student_ND, raw_RnV[0], records.scale_N[chunk].unsqueeze(1), chunk)
    return records


def _make_products(student_ND: Tensor, inputs: LossInputs, chunk: slice, raw_RnV: Tensor) -> None:
    """The raw products of all passes, written to raw_RnV."""
    hidden = [student_ND[chunk], *(scores.hidden_ND[chunk] for scores in inputs.passes)]
    # One product where all share the student's head: reading [V, D] is what takes the time at small n.
    if all(scores.head is None for scores in inputs.passes):
        inputs.head.product(torch.cat(hidden), raw_RnV.view(-1, raw_RnV.shape[2]))
        return
    for head, hidden_nD, raw_nV in zip(inputs.heads, hidden, raw_RnV, strict=True):
        head.product(hidden_nD, raw_nV)


class _Gradients:
    """What the chunks add up to: gradients of the student's hidden states and, where asked for, of the head. Held in
    fp32 at least and rounded once, after the scale of the loss: a factor common to all tokens, which rounded to half
    precision would change the learning rate, and without which gradients may be too small for float16."""

    def __init__(self, student_ND: Tensor, head: Head) -> None:
        self.weight_VD = head.weight_VD
        bias = head.weight_VD if head.bias_V is None else head.bias_V
        self.dtypes = student_ND.dtype, head.weight_VD.dtype, bias.dtype
        wide = torch.promote_types(head.weight_VD.dtype, torch.float32)
        self.hidden_ND = torch.empty_like(student_ND, dtype=torch.promote_types(student_ND.dtype, torch.float32))
        self.of_weight_VD, self.of_bias_V = (
            torch.zeros_like(tensor, dtype=wide) if tensor is not None and tensor.requires_grad else None
            for tensor in (head.weight_VD, head.bias_V)
        )

    def add(self, student_ND: Tensor, gradient_nV: Tensor, scale_n1: Tensor, chunk: slice) -> None:
        """`gradient_nV` times `scale_n1` is the gradient of the raw product; the scale goes on the narrow side."""
        gradient_nV = gradient_nV.to(self.weight_VD.dtype)
        self.hidden_ND[chunk] = back(gradient_nV, self.weight_VD) * scale_n1
        if self.of_bias_V is not None:
            self.of_bias_V += gradient_nV.T @ scale_n1.squeeze(1).to(gradient_nV.dtype)
        if self.of_weight_VD is not None:
            # The product with [V, D] is the expensive one, so the scale is applied to [n, D] and not to [n, V].
            hidden_nD = (student_ND[chunk] * scale_n1).to(gradient_nV.dtype)
            if self.of_weight_VD.dtype == gradient_nV.dtype:
                self.of_weight_VD.addmm_(gradient_nV.T, hidden_nD)
                return
            # Half-precision products are made a tile at a time and added in fp32.
            for start in range(0, len(self.of_weight_VD), TILE):
                self.of_weight_VD[start : start + TILE] += gradient_nV[:, start : start + TILE].T @ hidden_nD

    def scaled(self, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """All of them times `upstream`, in the types of what they belong to. To be called once."""
        scaled = (
            None if wide is None else wide.mul_(upstream.to(wide.dtype)).to(dtype)
            for wide, dtype in zip((self.hidden_ND, self.of_weight_VD, self.of_bias_V), self.dtypes, strict=True)
        )
        return tuple(scaled)


def chunks(rows: int, *, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows, and at least one, of nearly equal length."""
    count = -(-rows // max(1, size))
    return (slice(rows * i // count, rows * (i + 1) // count) for i in range(count))
