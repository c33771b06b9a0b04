"""Run by test_triton_dispatch in a process of its own, with TRITON_INTERPRET=1: the kernel against plain PyTorch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from divergence_table import DIVERGENCES

import opsd_cli.plugins  # noqa: F401  (registers the divergences)
from opsd_cli.loss.chunk_rows import LossInputs, TokenRecords, fits, numbers_of, torch_rows, triton_rows
from opsd_cli.loss.types import Head, TokenScores

FULL, HALF = torch.float32, torch.bfloat16
CASES = [({}, FULL), ({"scale": 1.5, "softcap": 2.0}, FULL), ({}, HALF)]
N, D, V = 2, 8, 4999  # more than one row and than one block, and not a multiple of anything


def worst_difference(divergence, transforms: dict[str, float], dtype: torch.dtype) -> float:
    """The largest difference of value, diagnostics and gradient, relative to the largest of each."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    student, teacher = (torch.randn(N, D, generator=generator).to(dtype) for _ in range(2))
    inputs = LossInputs(
        Head(weight, None, **transforms),
        TokenScores(teacher, None) if divergence.needs_teacher else None,
        torch.randint(0, V, (N,), generator=generator), torch.rand(N, generator=generator),
        divergence, 1.3, 2**30, (), False,
    )  # fmt: skip
    assert fits(inputs)
    passes = [student, *(scores.hidden_ND for scores in inputs.passes)]
    results = []
    for compute_rows in (torch_rows, triton_rows):
        raw_RnV = torch.stack([hidden @ weight.T for hidden in passes])
        records = TokenRecords(torch.empty(N), inputs.weights_N / inputs.temperature)
        compute_rows(inputs, raw_RnV, slice(0, N), records)
        results.append({"value": records.value_N, "gradient": raw_RnV[0].float(), **records.diagnostics})
    plain, fused = results
    assert plain.keys() == fused.keys(), (plain.keys(), fused.keys())
    return max(float((plain[name] - fused[name]).abs().max() / plain[name].abs().max()) for name in plain)


def main() -> None:
    found = {
        f"{divergence} {transforms} {dtype}": worst_difference(divergence, transforms, dtype)
        for divergence in filter(numbers_of, DIVERGENCES.values())
        for transforms, dtype in CASES
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
