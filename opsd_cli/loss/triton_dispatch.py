"""Whether the rows of a chunk can be computed by one Triton kernel, and with which numbers. Apart from the kernel,
whose file can be imported only where triton is installed."""

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
from opsd_cli.loss.inputs import LossInputs, TokenRecords

Numbers = tuple[str, float, float, float]
"""The kernel's name of a divergence, the teacher's share of its mixture as a logarithm, the student's, and a factor."""


def triton_takes(inputs: LossInputs) -> bool:
    """Whether the kernel can be used here: on a GPU, with triton installed, for what it computes."""
    return inputs.head.weight_VD.device.type == "cuda" and find_spec("triton") is not None and fits(inputs)


def fits(inputs: LossInputs) -> bool:
    """Whether the kernel computes what is asked for: a divergence over the full vocabulary that it knows, with at most
    one teacher pass and no factors."""
    half_or_single = inputs.head.weight_VD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    plain = inputs.mixture is None and not inputs.factors
    return half_or_single and plain and numbers_of(inputs.divergence) is not None


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


def triton_rows(inputs: LossInputs, raw_RnV: Tensor, chunk: slice, records: TokenRecords) -> None:
    """What `torch_rows` does, in one kernel, a row to each program."""
    from opsd_cli.loss.triton_rows import COLUMNS, launch

    numbers = numbers_of(inputs.divergence)
    assert numbers is not None, "a divergence without a kernel"
    columns_nC = torch.empty(raw_RnV.shape[1], len(COLUMNS), dtype=torch.float32, device=raw_RnV.device)
    launch(
        raw_RnV,
        inputs.target_ids_N[chunk],
        columns_nC,
        numbers,
        heads=(inputs.heads[0], inputs.heads[-1]),
        temperature=inputs.temperature,
    )
    columns = dict(zip(COLUMNS, columns_nC.unbind(dim=1), strict=True))
    value_n = columns.pop("value")
    # Without a teacher the kernel compares the student with itself; only its entropy says something.
    described = columns if inputs.teacher is not None else {"entropy/student": columns["entropy/student"]}
    records.write(chunk, value_n, described)
