"""The Triton kernel between the two products of the loss: one program reads one row of raw products of both roles and
writes value, diagnostics and, in place of the student's product, the gradient. Imported only where triton is
installed. The formulas are those of `divergences`, with which a test compares them.

Three passes over a row: the two normalisers; sums; the gradient g - p * sum(g). Where sum(g) is known beforehand
(forward KL, cross entropy, sampled token) the last two are one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from opsd_cli.loss.types import Head

COLUMNS = ("value", "logprob/student", "entropy/student", "entropy/teacher", "kl/forward", "kl/reverse", "agree/top1")
COUNT = tl.constexpr(len(COLUMNS))
KINDS = (
    "forward_kl", "cross_entropy", "sampled_token", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl",
    "total_variation",
)  # fmt: skip
FORWARD_KL, CROSS_ENTROPY, SAMPLED_TOKEN, REVERSE_KL, JSD, SKEW_FORWARD, SKEW_REVERSE, TOTAL_VARIATION = (
    tl.constexpr(number) for number in range(len(KINDS))
)
BLOCK = 4096  # vocabulary entries a program holds at a time


def launch(
    raw_RnV: Tensor,
    target_ids_n: Tensor,
    columns_nC: Tensor,
    numbers: tuple[str, float, float, float],
    *,
    heads: tuple[Head, Head],
    temperature: float,
) -> None:
    """Run the kernel on a chunk. raw_RnV [R, n, V] holds the student's raw products and, with R = 2, the teacher's;
    raw_RnV[0] is replaced by the gradient; `columns_nC` [n, 7] is filled in the order of COLUMNS."""
    kind, log_teacher, log_student, factor = numbers
    roles, rows, vocabulary = raw_RnV.shape
    student, teacher = heads
    _rows[(rows,)](
        raw_RnV[0],
        raw_RnV[roles - 1],
        target_ids_n,
        columns_nC,
        vocabulary,
        student.scale, student.softcap or 1.0, teacher.scale, teacher.softcap or 1.0, 1.0 / temperature,
        log_teacher, log_student, factor,
        KIND=KINDS.index(kind),
        STUDENT_CAP=student.softcap is not None,
        TEACHER_CAP=teacher.softcap is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=8,
    )  # fmt: skip


@triton.jit
def _rows(
    student_ptr, teacher_ptr, target_ptr, columns_ptr, vocabulary,
    student_scale, student_cap, teacher_scale, teacher_cap, per_temperature, log_teacher, log_student, factor,
    KIND: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * vocabulary
    teacher_ptr += row * vocabulary
    target = tl.load(target_ptr + row)
    entries = tl.arange(0, BLOCK)

    # First pass: both normalisers at once, by the running maximum of an online softmax, so that no logit is read twice
    # before it is known.
    student_max, student_sum = float("-inf"), 0.0
    teacher_max, teacher_sum = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + entries < vocabulary
        s = _logits(student_ptr + start + entries, inside, student_scale, student_cap, per_temperature, STUDENT_CAP)
        t = _logits(teacher_ptr + start + entries, inside, teacher_scale, teacher_cap, per_temperature, TEACHER_CAP)
        student_max, student_sum = _accumulate(s, student_max, student_sum)
        teacher_max, teacher_sum = _accumulate(t, teacher_max, teacher_sum)
    student_log, teacher_log = student_max + tl.log(student_sum), teacher_max + tl.log(teacher_sum)

    # The sampled token is read before the loop below overwrites the student's row with the gradient.
    at_student = tl.load(student_ptr + target).to(tl.float32)
    at_student = _transformed(at_student, student_scale, student_cap, per_temperature, STUDENT_CAP)
    at_teacher = tl.load(teacher_ptr + target).to(tl.float32)
    at_teacher = _transformed(at_teacher, teacher_scale, teacher_cap, per_temperature, TEACHER_CAP)
    logp_target = at_student - student_log
    advantage = at_teacher - teacher_log - logp_target

    # Second pass: every diagnostic, and either the gradient itself or the sums that it needs.
    total, total_g = 0.0, 0.0
    entropy_student, entropy_teacher, kl_forward, kl_reverse, agree = 0.0, 0.0, 0.0, 0.0, 0
    for start in range(0, vocabulary, BLOCK):
        inside = start + entries < vocabulary
        s = _logits(student_ptr + start + entries, inside, student_scale, student_cap, per_temperature, STUDENT_CAP)
        t = _logits(teacher_ptr + start + entries, inside, teacher_scale, teacher_cap, per_temperature, TEACHER_CAP)
        # Equal to the maxima of the first pass, to the bit: the logits are computed in the same way again.
        agree = tl.maximum(agree, tl.max(((s == student_max) & (t == teacher_max) & inside).to(tl.int32)))
        logp, logq = tl.where(inside, s - student_log, 0.0), tl.where(inside, t - teacher_log, 0.0)
        p, q = tl.where(inside, tl.exp(logp), 0.0), tl.where(inside, tl.exp(logq), 0.0)
        entropy_student -= tl.sum(p * logp)
        entropy_teacher -= tl.sum(q * logq)
        kl_forward += tl.sum(q * (logq - logp))
        kl_reverse += tl.sum(p * (logp - logq))
        if KIND > SAMPLED_TOKEN:
            contribution, g = _entry(logp, logq, p, q, log_teacher, log_student, factor, KIND)
            total += tl.sum(contribution)
            total_g += tl.sum(g)
        else:
            # sum(g) is known, -1 or minus the advantage, so that g - p * sum(g) needs no third pass.
            is_target = (start + entries == target).to(tl.float32)
            gradient = p - q
            if KIND == CROSS_ENTROPY:
                gradient = p - is_target
            if KIND == SAMPLED_TOKEN:
                gradient = advantage * (p - is_target)
            gradient = _to_raw(gradient, s, student_scale, student_cap, per_temperature, STUDENT_CAP)
            tl.store(student_ptr + start + entries, gradient.to(student_ptr.dtype.element_ty), mask=inside)

    if KIND > SAMPLED_TOKEN:
        # Third pass: through the softmax, g - p * sum(g).
        for start in range(0, vocabulary, BLOCK):
            inside = start + entries < vocabulary
            s = _logits(student_ptr + start + entries, inside, student_scale, student_cap, per_temperature, STUDENT_CAP)
            t = _logits(teacher_ptr + start + entries, inside, teacher_scale, teacher_cap, per_temperature, TEACHER_CAP)
            logp, logq = tl.where(inside, s - student_log, 0.0), tl.where(inside, t - teacher_log, 0.0)
            p, q = tl.where(inside, tl.exp(logp), 0.0), tl.where(inside, tl.exp(logq), 0.0)
            _, g = _entry(logp, logq, p, q, log_teacher, log_student, factor, KIND)
            gradient = _to_raw(g - p * total_g, s, student_scale, student_cap, per_temperature, STUDENT_CAP)
            tl.store(student_ptr + start + entries, gradient.to(student_ptr.dtype.element_ty), mask=inside)

    if KIND == FORWARD_KL:
        total = kl_forward
    if KIND == CROSS_ENTROPY:
        total = -logp_target
    if KIND == SAMPLED_TOKEN:
        total = -advantage * logp_target
    columns_ptr += row * COUNT
    tl.store(columns_ptr + 0, total)
    tl.store(columns_ptr + 1, logp_target)
    tl.store(columns_ptr + 2, entropy_student)
    tl.store(columns_ptr + 3, entropy_teacher)
    tl.store(columns_ptr + 4, kl_forward)
    tl.store(columns_ptr + 5, kl_reverse)
    tl.store(columns_ptr + 6, agree)  # converted to float


@triton.jit
def _logits(pointers, inside, scale, cap, per_temperature, CAP: tl.constexpr):
    """Logits over the temperature, fp32; minus infinity outside the vocabulary."""
    raw = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, _transformed(raw, scale, cap, per_temperature, CAP), float("-inf"))


@triton.jit
def _transformed(raw, scale, cap, per_temperature, CAP: tl.constexpr):
    """From raw products to logits over the temperature."""
    logits = raw * scale
    if CAP:
        logits = cap * (2.0 * tl.sigmoid(2.0 * logits / cap) - 1.0)  # tanh
    return logits * per_temperature


@triton.jit
def _accumulate(values, largest, total):
    """Running maximum, and the sum of exponentials relative to it."""
    new = tl.maximum(largest, tl.max(values))
    return new, total * tl.exp(largest - new) + tl.sum(tl.exp(values - new))


@triton.jit
def _to_raw(gradient, logits, scale, cap, per_temperature, CAP: tl.constexpr):
    """From the gradient with respect to logits / temperature to scale * cap'(.) times it; the temperature is in the
    token's scale."""
    if CAP:
        tanh = logits / (per_temperature * cap)
        gradient = gradient * (1.0 - tanh * tanh)
    return gradient * scale


@triton.jit
def _entry(logp, logq, p, q, log_teacher, log_student, factor, KIND: tl.constexpr):
    """An entry's contribution, and the gradient of the sum with respect to log p as an independent variable. Entries
    outside the vocabulary have p = q = 0 and log p = log q = 0, and add nothing."""
    # log(a q + (1 - a) p) from logarithms: stable where one of the two underflows.
    left, right = logq + log_teacher, logp + log_student
    mixture = tl.maximum(left, right) + tl.log(1.0 + tl.exp(-tl.abs(left - right)))
    if KIND == REVERSE_KL:
        contribution = p * (logp - logq)
        g = contribution + p
    elif KIND == TOTAL_VARIATION:
        difference = p - q
        sign = (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32)
        contribution = 0.5 * tl.abs(difference)
        g = 0.5 * sign * p
    elif KIND == SKEW_FORWARD:
        contribution = q * (logq - mixture)
        g = -q * tl.exp(right - mixture)  # the student's share of the mixture
    elif KIND == SKEW_REVERSE:
        contribution = p * (logp - mixture)
        g = contribution + p * (1.0 - tl.exp(right - mixture))
    else:
        to_student = tl.exp(log_student) * p * (logp - mixture)
        contribution = factor * (tl.exp(log_teacher) * q * (logq - mixture) + to_student)
        g = factor * to_student
    return contribution, g
