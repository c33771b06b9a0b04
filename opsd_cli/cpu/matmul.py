"""Matrix products with a weight, by the faster of the two libraries that torch has for a CPU.

torch gives fp32 products to MKL. On AMD's processors oneDNN is faster for large ones: with few rows, up to twice as
fast on several threads; with AVX-512 also with many rows, by 5 to 20 per cent, while without it those take 10 per cent
longer. Where MKL does them, it gets a few megabytes of the weight at a time, which is faster as well. All of it is
plain fp32.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 128  # of the other factor: with fewer, oneDNN is faster on all of AMD's processors
LARGE_BYTES = 2**20  # of a weight: a smaller one stays in the cache of one core, and MKL is as fast
TILE_BYTES = 4 * 2**20  # of the weight in one product with MKL, or into a given tensor: stays in the cache
CPU_FACTS = Path("/proc/cpuinfo")


def linear(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradient, [N, M]."""
    if not _is_large(weight_MK):
        return F.linear(x_NK, weight_MK, bias_M)
    if by_onednn(weight_MK, len(x_NK)):
        return _onednn(x_NK, weight_MK, bias_M)
    out_NM = x_NK.new_empty(len(x_NK), len(weight_MK))
    linear_into(out_NM, x_NK, weight_MK, bias_M)
    return out_NM


def add_linear(total_NM: Tensor, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> None:
    """total += x @ weight.T + bias, without gradient; in one operation where the product is small."""
    if bias_M is None and not _is_large(weight_MK):
        total_NM.addmm_(x_NK, weight_MK.T)
    else:
        total_NM += linear(x_NK, weight_MK, bias_M)


def linear_into(out_NM: Tensor, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> None:
    """x @ weight.T + bias, without gradient, written to `out_NM`: in the type of x and weight, or in fp32."""
    if out_NM.dtype != weight_MK.dtype:
        # fp32 from factors in half precision, without rounding to their type in between.
        if x_NK.device.type == "cuda":
            torch.mm(x_NK, weight_MK.T, out_dtype=out_NM.dtype, out=out_NM)
        else:  # torch has no such product here, so the weight is widened a part at a time
            x_NK = x_NK.to(out_NM.dtype)
            for part in _parts(weight_MK):
                torch.mm(x_NK, weight_MK[part].to(out_NM.dtype).T, out=out_NM[:, part])
        if bias_M is not None:
            out_NM += bias_M
        return
    onednn = by_onednn(weight_MK, len(x_NK))
    for part in _parts(weight_MK):
        tile_TK, bias_T, out_NT = weight_MK[part], None if bias_M is None else bias_M[part], out_NM[:, part]
        if onednn:
            out_NT.copy_(_onednn(x_NK, tile_TK, bias_T))
        elif bias_T is None:
            torch.mm(x_NK, tile_TK.T, out=out_NT)
        else:
            torch.addmm(bias_T, x_NK, tile_TK.T, out=out_NT)


def back(gradient_NM: Tensor, weight_MK: Tensor) -> Tensor:
    """gradient @ weight, [N, K]."""
    if by_onednn(weight_MK, len(gradient_NM)):
        return _onednn(gradient_NM, weight_MK.T, None)
    return gradient_NM @ weight_MK


def by_onednn(weight: Tensor, rows: int) -> bool:
    """Whether oneDNN does the product of this weight and a factor of so many rows."""
    return rows < onednn_rows() and _is_large(weight) and weight.is_contiguous()


@cache
def onednn_rows() -> int:
    """Products of fewer rows than this go to oneDNN."""
    # By the kind of processor, not by a measurement: a run repeated on the same machine must compute the same.
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    facts = CPU_FACTS.read_text() if available and CPU_FACTS.is_file() else ""
    if "AuthenticAMD" not in facts:
        return 0
    return sys.maxsize if "avx512f" in facts else FEW_ROWS


def _onednn(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NK, weight_MK, bias_M, "none", [], "")


def _is_large(weight: Tensor) -> bool:
    """Whether the choice matters: fp32 on a CPU, and more than the cache holds."""
    fp32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return fp32_on_cpu and weight.numel() * weight.element_size() >= LARGE_BYTES


def _parts(weight_MK: Tensor) -> list[slice]:
    """Rows of the weight that are multiplied at a time: on a CPU some, elsewhere all."""
    size = len(weight_MK)
    if weight_MK.device.type == "cpu":
        size = max(1, TILE_BYTES // (weight_MK.element_size() * weight_MK.shape[1]))
    return [slice(start, start + size) for start in range(0, len(weight_MK), size)]
