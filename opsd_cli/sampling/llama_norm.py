"""Root-mean-square norms for generation: x / sqrt(mean(x^2) + eps) * weight over the last dimension. Owns how they are
made: on a GPU, and in half precision, by torch, where it is one kernel; on a CPU, where torch takes seven operations
of some microseconds each, from the length of x in three, with the weight multiplied into the projection that follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TorchNorm:
    """torch's own. The weight is [size], or [heads, size] where the heads of x have weights of their own."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape[-1:], None, self.eps) * self.weight


@dataclass(frozen=True)
class LengthNorm:
    """x / sqrt(|x|^2 + size * eps) * gain, where the gain is the weight times sqrt(size), or left to what follows."""

    gain: Tensor | None
    floor: Tensor  # sqrt(size * eps)

    def __call__(self, x: Tensor) -> Tensor:
        unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)
        return unit if self.gain is None else unit.mul_(self.gain)

    def without_gain(self) -> LengthNorm:
        return LengthNorm(None, self.floor)


Norm = TorchNorm | LengthNorm


def norm_of(weight: Tensor, eps: float) -> Norm:
    """The faster of the two on the weight's device."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return TorchNorm(weight, eps)
    size = weight.shape[-1]
    return LengthNorm(weight * size**0.5, weight.new_tensor((size * eps) ** 0.5))
