"""The loss between its two products, every divergence and every path, against float64: value, diagnostics and gradient.
Each path is judged by itself; two that agree may both be wrong."""

from __future__ import annotations

from functools import cache, partial

import divergence_table
import torch
from divergence_table import DIVERGENCES
from torch import Tensor

from gpu_checks.check import Bench, Check, Figure, Found
from gpu_checks.loss_rows import (
    CLIPS,
    SUPPORTS,
    Answer,
    Rows,
    Transform,
    answer,
    gates,
    importance,
)
from opsd_cli.loss.chunk_rows import numbers_of

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TRANSFORMS = (Transform(), Transform(scale=1.5, softcap=25.0))
VALUE = 5e-4  # relative to the largest, of values and diagnostics: sums of 262,145 numbers in fp32
# Relative L2. A gradient is written in bf16: rounding it to the nearest is up to 2^-8 off, and cutting it, as triton's
# interpreter does, up to 2^-7. What is wrong is off by more.
GRADIENT = {torch.float32: 5e-4, torch.bfloat16: 2**-7}
WIDTHS, SMALL_WIDTHS = (4_999, 151_936, 262_145), (499, 4_999)


def checks(bench: Bench) -> list[Check]:
    made = []
    for width in SMALL_WIDTHS if bench.is_small else WIDTHS:
        for dtype, name in NAMES.items():
            for path in ("triton", "plain"):
                why = "needs a card: triton runs on nothing else" if path == "triton" else ""
                made.append(Check(f"{path} {name}, V={width:,}", partial(divergences, bench, path, width, dtype), why))
        made += [
            Check(f"plain clips, V={width:,}", partial(variants, bench, width, "clip")),
            Check(f"plain supports, V={width:,}", partial(variants, bench, width, "support")),
            Check(f"plain gates and importance, V={width:,}", partial(variants, bench, width, "factor")),
        ]
    return made


@cache
def rows_of(width: int, dtype: torch.dtype) -> Rows:
    """Rows from peaked to flat, on the CPU, rounded to `dtype`. The teacher differs from the student by 0.3 to 0.6 at
    every entry, up or down, so that the sign of a difference, total variation's gradient, hangs on no rounding."""
    generator = torch.Generator().manual_seed(width)
    spread_n1 = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0]).unsqueeze(1)
    student_nV = spread_n1 * torch.randn(len(spread_n1), width, generator=generator)
    apart_nV = 0.3 + 0.3 * torch.rand(student_nV.shape, generator=generator)
    sign_nV = 1.0 - 2.0 * torch.randint(0, 2, student_nV.shape, generator=generator)
    tokens_n = torch.randint(0, width, (len(spread_n1),), generator=generator)
    weights_n = 0.5 + torch.rand(len(spread_n1), generator=generator)
    return Rows(student_nV.to(dtype), (student_nV + sign_nV * apart_nV).to(dtype), tokens_n, weights_n)


@cache
def exact(width: int, dtype: torch.dtype, name: str, transform: Transform) -> Answer:
    """The answer in float64 on the CPU."""
    rows = rows_of(width, dtype).to(torch.device("cpu"), torch.float64)
    numbers = {"scale": transform.scale, "softcap": transform.softcap, "temperature": transform.temperature}
    leaf_nV = rows.student_nV.clone().requires_grad_()
    p_nV = divergence_table.logprobs(leaf_nV, **numbers)
    q_nV = divergence_table.logprobs(rows.teacher_nV, **numbers)
    value_n = divergence_table.FORMULAS[name](p_nV, q_nV, rows.tokens_n)
    value_n.sum().backward()
    diagnostics = divergence_table.describe(p_nV.detach(), q_nV, rows.tokens_n)
    if not DIVERGENCES[name].needs_teacher:
        diagnostics = {name: diagnostics[name] for name in ("logprob/student", "entropy/student")}
    # The gradient of a path is that of a token's logits before the temperature is divided out.
    return Answer(value_n.detach(), leaf_nV.grad * transform.temperature, diagnostics)


def divergences(bench: Bench, path: str, width: int, dtype: torch.dtype) -> Found:
    """All divergences with and without scale and soft cap."""
    errors: dict[str, dict[str, float]] = {"value": {}, "diagnostics": {}, "gradient": {}}
    rows = rows_of(width, dtype).to(bench.device, dtype)
    for transform in TRANSFORMS:
        for name, divergence in DIVERGENCES.items():
            if path == "triton" and numbers_of(divergence) is None:
                continue  # it has no kernel, and runs as plain PyTorch
            case = name if transform is TRANSFORMS[0] else f"{name} capped"
            compare(errors, case, answer(path, rows, divergence, transform), exact(width, dtype, name, transform))
    return judged(errors, dtype)


def variants(bench: Bench, width: int, kind: str) -> Found:
    """Clips, supports and factors: plain PyTorch here against the same in float64 on the CPU. Whether their formulas
    are right is the matter of the tests; here it is whether this device computes them."""
    dtype, cpu = torch.float32, torch.device("cpu")
    errors: dict[str, dict[str, float]] = {"value": {}, "diagnostics": {}, "gradient": {}}
    here, there = rows_of(width, dtype).to(bench.device, dtype), rows_of(width, dtype).to(cpu, torch.float64)
    forward_kl = DIVERGENCES["forward_kl"]
    sampler_N = torch.linspace(-2.0, -14.0, len(here.tokens_n))
    for transform in TRANSFORMS:
        cases = {
            "clip": {name: (clip, (), ()) for name, clip in CLIPS.items()},
            "support": {name: (support, (), ()) for name, support in SUPPORTS.items()},
            "factor": {name: (forward_kl, gate, gate) for name, gate in gates().items()}
            | {"importance": (forward_kl, importance(sampler_N.to(bench.device)), importance(sampler_N.double()))},
        }[kind]
        for name, (divergence, factors, exact_factors) in cases.items():
            found = answer("plain", here, divergence, transform, factors)
            compare(errors, name, found, answer("plain", there, divergence, transform, exact_factors))
    return judged(errors, dtype)


def compare(errors: dict[str, dict[str, float]], case: str, found: Answer, expected: Answer) -> None:
    """Note how far each part of an answer is from float64."""
    assert found.diagnostics.keys() == expected.diagnostics.keys(), f"{case}: {found.diagnostics.keys()}"
    errors["value"][case] = largest(found.value_n, expected.value_n)
    for name, described_n in found.diagnostics.items():
        errors["diagnostics"][f"{case} {name}"] = largest(described_n, expected.diagnostics[name])
    errors["gradient"][case] = apart(found.gradient_nV, expected.gradient_nV)
    if found.scale_n is not None and expected.scale_n is not None:
        errors["value"][f"{case} scale"] = largest(found.scale_n, expected.scale_n)


def largest(found_n: Tensor, expected_n: Tensor) -> float:
    """The largest difference, over the largest number."""
    return float((found_n.cpu().double() - expected_n).abs().max() / expected_n.abs().max().clamp(min=1e-30))


def apart(found_nV: Tensor, expected_nV: Tensor) -> float:
    """The worst row's relative L2 distance."""
    distance_n = (found_nV.cpu().double() - expected_nV).norm(dim=1)
    return float((distance_n / expected_nV.norm(dim=1).clamp(min=1e-30)).max())


def judged(errors: dict[str, dict[str, float]], dtype: torch.dtype) -> Found:
    """The worst case of each part, and every case that is over its limit by name."""
    limits = {"value": VALUE, "diagnostics": VALUE, "gradient": GRADIENT[dtype]}
    figures = tuple(Figure(part, max(found.values()), limits[part]) for part, found in errors.items())
    over = [
        f"{part} of {case} {error:.1e}"
        for part, found in errors.items()
        for case, error in found.items()
        if not error <= limits[part]
    ]
    return Found(figures, "over: " + ", ".join(over) if over else f"{len(errors['value'])} cases")
