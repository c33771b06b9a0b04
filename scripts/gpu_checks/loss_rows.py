"""The middle of the loss as the checks call it: from raw products to value, diagnostics and gradient, by the kernel or
in plain PyTorch, in any type. The one file to change when those parts move."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import opsd_cli.plugins  # noqa: F401  (registers the divergences)
from opsd_cli.loss.chunk_rows import LossInputs, TokenRecords, torch_rows, triton_rows
from opsd_cli.loss.clip import apply_clip
from opsd_cli.loss.divergences import (
    Divergence,
    ForwardKL,
)
from opsd_cli.loss.support import restrict_support
from opsd_cli.loss.token_factors import Gate, Importance
from opsd_cli.loss.types import Head, TokenScores
from opsd_cli.settings.config import ClipSettings, SupportSettings, TokenSettings

EVERY_TOKEN = TokenSettings(
    skip_first=0, first=0, prefix_nats=0.0, prefix_of="all", ramp=0.0, skip_special=False, keep="all",
    pass_powers=(0.0, 0.0), gate="none", gate_min=0.0, gate_width=0.0, gate_low=0.0, gate_high=1.0,
)  # fmt: skip
PATHS = {"triton": triton_rows, "plain": torch_rows}
CLIPS = {kind: apply_clip(ForwardKL(), ClipSettings(kind=kind, limit=0.01)) for kind in ("entry", "neutral", "token")}
SUPPORTS = {
    f"{side}, {rest}": restrict_support(ForwardKL(), SupportSettings(side=side, k=100, rest=rest))
    for side in ("teacher", "student", "union")
    for rest in ("renormalise", "tail", "drop")
}


@dataclass(frozen=True)
class Rows:
    """Raw products of both roles, and what else a token has."""

    student_nV: Tensor
    teacher_nV: Tensor
    tokens_n: Tensor
    weights_n: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Rows:
        wide = torch.promote_types(dtype, torch.float32)
        return Rows(
            self.student_nV.to(device, dtype), self.teacher_nV.to(device, dtype), self.tokens_n.to(device),
            self.weights_n.to(device, wide),
        )  # fmt: skip


@dataclass(frozen=True)
class Transform:
    """What lies between a raw product and a distribution."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.3


@dataclass
class Answer:
    """What a path makes of the rows."""

    value_n: Tensor
    gradient_nV: Tensor
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    scale_n: Tensor | None = None


def gates() -> dict[str, tuple]:
    """Token rules that need both distributions."""
    least = {"student_entropy": 3.0, "teacher_entropy": 3.0, "privilege": 0.0}
    return {kind: (Gate(replace(EVERY_TOKEN, gate=kind, gate_min=nats)),) for kind, nats in least.items()}


def importance(sampler_logprobs_N: Tensor) -> tuple[Importance]:
    return (Importance(sampler_logprobs_N, 1.5),)


def answer(path: str, rows: Rows, divergence: Divergence, transform: Transform, factors: tuple = ()) -> Answer:
    """Run one path over all rows at once."""
    raw_RnV = torch.stack([rows.student_nV, rows.teacher_nV] if divergence.needs_teacher else [rows.student_nV])
    head = Head(rows.student_nV.new_empty(rows.student_nV.shape[1], 0), None, transform.scale, transform.softcap)
    teacher = TokenScores(rows.student_nV.new_empty(len(rows.tokens_n), 0), None)
    inputs = LossInputs(
        head, teacher if divergence.needs_teacher else None, rows.tokens_n, rows.weights_n, divergence,
        transform.temperature, 2**30, factors, wide_logits=False,
    )  # fmt: skip
    records = TokenRecords(torch.empty_like(rows.weights_n), rows.weights_n / transform.temperature)
    PATHS[path](inputs, raw_RnV, slice(0, len(rows.tokens_n)), records)
    return Answer(records.value_N, raw_RnV[0], records.diagnostics, records.scale_N)
