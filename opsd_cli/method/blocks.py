"""What lies between the two products with the head, in plain PyTorch, for any divergence: from raw products to value,
diagnostics and gradient. Owns the temperature, the mixing of passes and the diagnostics; makes no matrix product.

It goes through a chunk a few rows at a time. The same formulas over a whole chunk would write and read back a dozen
[n, V] tensors; those of a block stay in the processor's cache, which is about three times as fast on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_cli.method.divergence import AlignedTokens, inner
from opsd_cli.method.scores import Job, Notes

CACHE_BYTES = 2**20  # what one [block, V] fp32 tensor may take for each core: about its own cache
GPU_SHARE = 8  # of a chunk's bytes, for a block on a GPU: large ones, about eight of which are alive at once


class RowBlocks:
    """Value, diagnostics and gradient of a chunk, block by block."""

    def __init__(self, job: Job) -> None:
        self.job, self.heads = job, job.heads

    def __call__(self, raw_RnV: Tensor, chunk: slice, notes: Notes) -> None:
        size = self._rows(raw_RnV)
        for start in range(chunk.start, chunk.stop, size):
            rows = slice(start, min(start + size, chunk.stop))
            self._block(raw_RnV[:, rows.start - chunk.start : rows.stop - chunk.start], rows, notes)

    def _rows(self, raw_RnV: Tensor) -> int:
        """Rows of a block: at least one for each core, since row-wise operations are shared out by rows."""
        row_bytes = 4 * raw_RnV.shape[2]
        if raw_RnV.device.type != "cpu":
            return max(1, self.job.chunk_bytes // GPU_SHARE // row_bytes)
        return torch.get_num_threads() * max(1, CACHE_BYTES // row_bytes)

    def _block(self, raw_RnV: Tensor, rows: slice, notes: Notes) -> None:
        logits_nV = self.heads[0].transformed(raw_RnV[0])
        tokens = self._align(logits_nV, raw_RnV, rows)
        value_n, gradient_nV = self.job.divergence.value_and_gradient(tokens)
        diagnostics = describe(tokens, with_teacher=self.job.teacher is not None)
        for factor in self.job.factors:
            factor_n = factor(tokens, rows)
            diagnostics[factor.name] = factor_n
            value_n = value_n * factor_n
            notes.scale_N[rows] *= factor_n
        notes.note(rows, value_n, diagnostics)
        raw_RnV[0] = self.heads[0].back_to_raw(gradient_nV, logits_nV)

    def _align(self, logits_nV: Tensor, raw_RnV: Tensor, rows: slice) -> AlignedTokens:
        """Both distributions of one block. Without a teacher the student stands in for it: every ratio is then 0."""
        student_nV, teacher_nV = self._logprobs(logits_nV), None
        for place, head in enumerate(self.heads[1:], start=1):
            logprobs_nV = self._logprobs(head.transformed(raw_RnV[place]))
            if self.job.mixture is not None:
                logprobs_nV = logprobs_nV * self.job.mixture.parts[place - 1][0]
            teacher_nV = logprobs_nV if teacher_nV is None else teacher_nV + logprobs_nV
        if teacher_nV is None:
            teacher_nV = student_nV
        elif self.job.mixture is not None:
            teacher_nV = (teacher_nV + self.job.mixture.student_weight * student_nV).log_softmax(dim=1)
        return AlignedTokens(student_nV, teacher_nV, self.job.target_ids_N[rows])

    def _logprobs(self, logits_nV: Tensor) -> Tensor:
        if self.job.temperature != 1.0:
            logits_nV = logits_nV / self.job.temperature
        return logits_nV.log_softmax(dim=1)


def describe(tokens: AlignedTokens, *, with_teacher: bool) -> dict[str, Tensor]:
    """What is logged about every token whatever the divergence is, so that runs can be compared. Each [n], nats."""
    diagnostics = {"entropy/student": -inner(tokens.student_probs_nV, tokens.student_logprobs_nV)}
    if with_teacher:
        # One search instead of two: where the teacher's choice is the student's as well, it has the largest logit.
        choice_n1 = tokens.teacher_logprobs_nV.argmax(dim=1, keepdim=True)
        same_n = tokens.student_logprobs_nV.gather(1, choice_n1).squeeze(1) == tokens.student_logprobs_nV.amax(dim=1)
        diagnostics |= {
            "entropy/teacher": -inner(tokens.teacher_probs_nV, tokens.teacher_logprobs_nV),
            "kl/forward": tokens.forward_kl_n,
            "kl/reverse": tokens.reverse_kl_n,
            "agree/top1": same_n.to(tokens.student_logprobs_nV.dtype),
        }
    return diagnostics
