"""Whether the middle of the loss can run as one Triton kernel, and with which numbers. Owns the choice and the launch;
the kernel itself is in `triton_rows`, which is imported only where there is a GPU and triton.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from math import log
from typing import Any

import torch
from torch import Tensor

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
)
from opsd_cli.loss.types import Job, Notes

Numbers = tuple[str, float, float, float]
"""The kernel's name of a divergence, the teacher's share of its mixture as a logarithm, the student's, and a factor."""


def fused_rows(job: Job) -> FusedRows | None:
    """The kernel for this job where it applies: on a GPU, with triton, for a divergence over the full vocabulary with
    at most one teacher pass and no factors. None sends it to plain PyTorch."""
    if job.head.weight_VD.device.type != "cuda" or find_spec("triton") is None:
        return None
    return FusedRows(job) if fits(job) else None


def fits(job: Job) -> bool:
    """Whether the kernel computes what the job asks for."""
    half_or_single = job.head.weight_VD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    plain = job.mixture is None and not job.factors
    return half_or_single and plain and numbers_of(job.divergence) is not None


def numbers_of(divergence: Divergence) -> Numbers | None:
    """What the kernel needs to know of a divergence; None for one it does not know, such as a subclass of one it does:
    what that redefines is not in the kernel."""
    kind = type(divergence)
    return _NUMBERS[kind](divergence) if kind in _NUMBERS else None


def _of_jsd(jsd: GeneralizedJSD) -> Numbers:
    scale = 1.0 / min(jsd.beta, 1.0 - jsd.beta) if jsd.normalize else 1.0
    return "jsd", log(jsd.beta), log(1.0 - jsd.beta), scale


_NUMBERS: dict[type, Callable[[Any], Numbers]] = {
    ForwardKL: lambda _: ("forward_kl", 0.0, 0.0, 1.0),
    ReverseKL: lambda _: ("reverse_kl", 0.0, 0.0, 1.0),
    GeneralizedJSD: _of_jsd,
    SkewForwardKL: lambda skew: ("skew_forward_kl", log(skew.alpha), log(1.0 - skew.alpha), 1.0),
    SkewReverseKL: lambda skew: ("skew_reverse_kl", log(1.0 - skew.alpha), log(skew.alpha), 1.0),
    TotalVariation: lambda _: ("total_variation", 0.0, 0.0, 1.0),
    SampledToken: lambda _: ("sampled_token", 0.0, 0.0, 1.0),
    CrossEntropy: lambda _: ("cross_entropy", 0.0, 0.0, 1.0),
}


class FusedRows:
    """Value, diagnostics and gradient of a chunk in one kernel, a row to each program."""

    def __init__(self, job: Job) -> None:
        numbers = numbers_of(job.divergence)
        assert numbers is not None, "a divergence without a kernel"
        self.job, self.numbers = job, numbers

    def __call__(self, raw_RnV: Tensor, chunk: slice, notes: Notes) -> None:
        from opsd_cli.loss.triton_rows import COLUMNS, launch

        with_teacher = self.job.teacher is not None
        columns_nC = torch.empty(raw_RnV.shape[1], len(COLUMNS), dtype=torch.float32, device=raw_RnV.device)
        launch(
            raw_RnV,
            self.job.target_ids_N[chunk],
            columns_nC,
            self.numbers,
            heads=(self.job.heads[0], self.job.heads[-1]),
            temperature=self.job.temperature,
        )
        columns = dict(zip(COLUMNS, columns_nC.unbind(dim=1), strict=True))
        value_n = columns.pop("value")
        notes.note(chunk, value_n, columns if with_teacher else {"entropy/student": columns["entropy/student"]})
