"""What lies between the two products with the head: from a chunk's raw products to value, diagnostics and gradient. In
plain PyTorch for any divergence, or by one Triton kernel (`triton_rows`, which only machines with triton can import)
for those that it knows.

Plain PyTorch goes through a chunk a few rows at a time. The same formulas over a whole chunk would write and read back
a dozen [n, V] tensors; those of a block stay in the processor's cache, which is about three times as fast on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib.util import find_spec
from math import log
from typing import Any

import torch
from torch import Tensor

from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.divergences import (
    CrossEntropy,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SampledToken,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    is_autograds,
)
from opsd_cli.loss.token_factors import Factor
from opsd_cli.loss.types import Head, TokenMixture, TokenScores

CACHE_BYTES = 2**20  # what one [block, V] fp32 tensor may take for each core: about its own cache
GPU_SHARE = 8  # of a chunk's bytes, for a block on a GPU: large ones, about eight of which are alive at once


@dataclass(frozen=True)
class LossInputs:
    """Everything of one micro-batch that is not differentiated."""

    head: Head  # the student's
    teacher: TokenScores | TokenMixture | None  # None for a divergence that needs none
    target_ids_N: Tensor
    weights_N: Tensor
    divergence: Divergence
    temperature: float  # what both logits are divided by first
    chunk_bytes: int  # bounds the raw products that are alive at once, those of all passes together
    factors: tuple[Factor, ...] = ()  # scale a token's value and gradient by a constant
    wide_logits: bool = False  # fp32 for a half-precision head: bfloat16 holds a logit of 20 to within 0.06
    right_N: Tensor | None = None  # bool: tokens of completions with the right answer, for what looks at that

    @property
    def logits_dtype(self) -> torch.dtype:
        """The type the raw products are made in: the head's own, unless wider ones were asked for."""
        own = self.head.weight_VD.dtype
        return torch.promote_types(own, torch.float32) if self.wide_logits else own

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
        # Autograd keeps about as many tensors of a block again: half of the rows take the same memory.
        share = GPU_SHARE * (2 if is_autograds(inputs.divergence) else 1)
        return max(1, inputs.chunk_bytes // share // row_bytes)
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
    if isinstance(inputs.teacher, TokenMixture):
        teacher_nV, teacher_probs_nV = mix(inputs.teacher, student_nV, [logprobs_nV for logprobs_nV, _ in parts])
    right_n = None if inputs.right_N is None else inputs.right_N[rows]
    return AlignedTokens(student_nV, teacher_nV, inputs.target_ids_N[rows], student_probs_nV, teacher_probs_nV, right_n)


def mix(mixture: TokenMixture, student_nV: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities of a target, both [n, V], from the log-probabilities of its passes."""
    shares = [weight for weight, _ in mixture.parts]
    if mixture.in_probabilities:
        # From logarithms: an entry that underflows in every pass keeps its ratio to the others.
        weighted = [logprobs_nV + log(share) for share, logprobs_nV in zip(shares, parts, strict=True)]
        mean_nV = reduce(torch.logaddexp, weighted)
        return mean_nV, mean_nV.exp()
    # A weighted sum of log-probabilities; `distribution` renormalises it over the vocabulary.
    mixed_nV = mixture.student_weight * student_nV
    for share, logprobs_nV in zip(shares, parts, strict=True):
        mixed_nV += share * logprobs_nV
    return distribution(mixed_nV)


def distribution(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities, both [n, V], for one exponential of each entry: the largest probability is
    1 / sum(exp(logits - max)), so its logarithm gives the normaliser."""
    probs_nV = logits_nV.softmax(dim=1)
    normaliser_n1 = logits_nV.amax(dim=1, keepdim=True) - probs_nV.amax(dim=1, keepdim=True).log()
    return logits_nV - normaliser_n1, probs_nV


def describe(tokens: AlignedTokens, *, with_teacher: bool) -> dict[str, Tensor]:
    """What is logged about every token whatever the divergence is, so that runs can be compared. Each [n], nats."""
    diagnostics = {
        "logprob/student": tokens.at_target(tokens.student_logprobs_nV),
        "entropy/student": tokens.student_entropy_n,
    }
    if with_teacher:
        # Where both have their largest entry in one place, and only there, the largest sum is the sum of the largest.
        student_nV, teacher_nV = tokens.student_logprobs_nV, tokens.teacher_logprobs_nV
        same_n = (student_nV + teacher_nV).amax(dim=1) == student_nV.amax(dim=1) + teacher_nV.amax(dim=1)
        diagnostics |= {
            "entropy/teacher": tokens.teacher_entropy_n,
            "kl/forward": tokens.forward_kl_n,
            "kl/reverse": tokens.reverse_kl_n,
            "agree/top1": same_n.to(student_nV.dtype),
        }
    return diagnostics


Numbers = tuple[str, float, float, float]
"""The kernel's name of a divergence, the teacher's share of its mixture as a logarithm, the student's, and a factor."""


def triton_takes(inputs: LossInputs) -> bool:
    """Whether the kernel can be used here: on a GPU, with triton installed, for what it computes."""
    return inputs.head.weight_VD.device.type == "cuda" and find_spec("triton") is not None and fits(inputs)


def fits(inputs: LossInputs) -> bool:
    """Whether the kernel computes what is asked for: a divergence over the full vocabulary that it knows, with at most
    one teacher pass and no factors."""
    half_or_single = inputs.head.weight_VD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    plain = not isinstance(inputs.teacher, TokenMixture) and not inputs.factors
    return half_or_single and plain and numbers_of(inputs.divergence) is not None


def numbers_of(divergence: Divergence) -> Numbers | None:
    """What the kernel needs to know of a divergence; None for one it does not know, such as a subclass of one it does:
    what that redefines is not in the kernel."""
    kind = type(divergence)
    return _NUMBERS[kind](divergence) if kind in _NUMBERS else None


_NUMBERS: dict[type, Callable[[Any], Numbers]] = {
    ForwardKL: lambda _: ("forward_kl", 0.0, 0.0, 1.0),
    ReverseKL: lambda _: ("reverse_kl", 0.0, 0.0, 1.0),
    GeneralizedJSD: lambda jsd: ("jsd", log(jsd.beta), log(1.0 - jsd.beta), jsd.scale),
    SkewForwardKL: lambda skew: ("skew_forward_kl", log(skew.alpha), log(1.0 - skew.alpha), 1.0),
    SkewReverseKL: lambda skew: ("skew_reverse_kl", log(1.0 - skew.alpha), log(skew.alpha), 1.0),
    TotalVariation: lambda _: ("total_variation", 0.0, 0.0, 1.0),
    SampledToken: lambda _: ("sampled_token", 0.0, 0.0, 1.0),
    CrossEntropy: lambda _: ("cross_entropy", 0.0, 0.0, 1.0),
}


def triton_rows(inputs: LossInputs, raw_RnV: Tensor, chunk: slice, records: TokenRecords) -> None:
    """What `torch_rows` does, in one kernel, a row to each program."""
    from opsd_cli.loss.triton_rows import COLUMNS, launch

    numbers = numbers_of(inputs.divergence)
    assert numbers is not None, "a divergence without a kernel"
    columns_nC = torch.empty(raw_RnV.shape[1], len(COLUMNS), dtype=torch.float32, device=raw_RnV.device)
    heads = inputs.heads[0], inputs.heads[-1]
    launch(raw_RnV, inputs.target_ids_N[chunk], columns_nC, numbers, heads=heads, temperature=inputs.temperature)
    value_n, *described = columns_nC.unbind(dim=1)
    diagnostics = dict(zip(COLUMNS[1:], described, strict=True))
    # Without a teacher the kernel compares the student with itself; only what is the student's own says something.
    if inputs.teacher is None:
        diagnostics = {name: diagnostics[name] for name in ("logprob/student", "entropy/student")}
    records.write(chunk, value_n, diagnostics)
