"""What lies between the two products with the head, in plain PyTorch, for any divergence: from raw products to value,
diagnostics and gradient.

It goes through a chunk a few rows at a time. The same formulas over a whole chunk would write and read back a dozen
[n, V] tensors; those of a block stay in the processor's cache, which is about three times as fast on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_cli.loss.divergences import AlignedTokens, rowwise_dot
from opsd_cli.loss.inputs import LossInputs, TokenRecords

CACHE_BYTES = 2**20  # what one [block, V] fp32 tensor may take for each core: about its own cache
GPU_SHARE = 8  # of a chunk's bytes, for a block on a GPU: large ones, about eight of which are alive at once


def torch_rows(inputs: LossInputs, raw_RnV: Tensor, chunk: slice, records: TokenRecords) -> None:
    """Value and diagnostics of a chunk, written to `records`; the student's raw product, raw_RnV[0], is replaced by the
    gradient. raw_RnV[1:] are the products of the target's passes."""
    size = block_rows(inputs, raw_RnV)
    for start in range(chunk.start, chunk.stop, size):
        rows = slice(start, min(start + size, chunk.stop))
        _block(inputs, raw_RnV[:, rows.start - chunk.start : rows.stop - chunk.start], rows, records)


def block_rows(inputs: LossInputs, raw_RnV: Tensor) -> int:
    """Rows of a block: at least one for each core, since row-wise operations are shared out by rows."""
    row_bytes = 4 * raw_RnV.shape[2]
    if raw_RnV.device.type != "cpu":
        return max(1, inputs.chunk_bytes // GPU_SHARE // row_bytes)
    return torch.get_num_threads() * max(1, CACHE_BYTES // row_bytes)


def _block(inputs: LossInputs, raw_RnV: Tensor, rows: slice, records: TokenRecords) -> None:
    head = inputs.head
    logits_nV = head.transformed(raw_RnV[0])
    tokens = _align(inputs, logits_nV, raw_RnV, rows)
    value_n, gradient_nV = inputs.divergence.value_and_gradient(tokens)
    diagnostics = describe(tokens, with_teacher=inputs.teacher is not None)
    for factor in inputs.factors:
        factor_n = factor(tokens, rows)
        diagnostics[factor.name] = factor_n
        value_n = value_n * factor_n
        records.scale_N[rows] *= factor_n
    records.write(rows, value_n, diagnostics)
    # Weight, factors and temperature are left out: they are in records.scale_N and are applied on the narrow side.
    raw_RnV[0] = head.back_to_raw(gradient_nV, logits_nV)


def _align(inputs: LossInputs, logits_nV: Tensor, raw_RnV: Tensor, rows: slice) -> AlignedTokens:
    """Both distributions of one block. Without a teacher the student stands in for it: every ratio is then 0."""

    def tempered(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        return distribution(logits_nV if inputs.temperature == 1.0 else logits_nV / inputs.temperature)

    student_nV, student_probs_nV = tempered(logits_nV)
    passes = zip(inputs.heads[1:], raw_RnV[1:], strict=True)
    parts = [tempered(head.transformed(raw_nV)) for head, raw_nV in passes]
    teacher_nV, teacher_probs_nV = parts[0] if parts else (student_nV, student_probs_nV)
    if inputs.mixture is not None:
        # A weighted sum of log-probabilities; `distribution` renormalises it over the vocabulary.
        mixed_nV = inputs.mixture.student_weight * student_nV
        for (weight, _), (logprobs_nV, _) in zip(inputs.mixture.parts, parts, strict=True):
            mixed_nV += weight * logprobs_nV
        teacher_nV, teacher_probs_nV = distribution(mixed_nV)
    return AlignedTokens(student_nV, teacher_nV, inputs.target_ids_N[rows], student_probs_nV, teacher_probs_nV)


def distribution(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities, both [n, V], for one exponential of each entry.

    The largest probability is 1 / sum(exp(logits - max)), so its logarithm gives the normaliser.
    """
    probs_nV = logits_nV.softmax(dim=1)
    normaliser_n1 = logits_nV.amax(dim=1, keepdim=True) - probs_nV.amax(dim=1, keepdim=True).log()
    return logits_nV - normaliser_n1, probs_nV


def describe(tokens: AlignedTokens, *, with_teacher: bool) -> dict[str, Tensor]:
    """What is logged about every token whatever the divergence is, so that runs can be compared. Each [n], nats."""
    diagnostics = {"entropy/student": -rowwise_dot(tokens.student_probs_nV, tokens.student_logprobs_nV)}
    if with_teacher:
        # Where both have their largest entry in one place, and only there, the largest sum is the sum of the largest.
        student_nV, teacher_nV = tokens.student_logprobs_nV, tokens.teacher_logprobs_nV
        same_n = (student_nV + teacher_nV).amax(dim=1) == student_nV.amax(dim=1) + teacher_nV.amax(dim=1)
        diagnostics |= {
            "entropy/teacher": -rowwise_dot(tokens.teacher_probs_nV, tokens.teacher_logprobs_nV),
            "kl/forward": tokens.forward_kl_n,
            "kl/reverse": tokens.reverse_kl_n,
            "agree/top1": same_n.to(student_nV.dtype),
        }
    return diagnostics
