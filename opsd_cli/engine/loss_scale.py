"""Training in float16: the loss is multiplied by a scale so that small gradients do not vanish, and the scale is halved
when a gradient overflows. Owns when the scale grows and what an overflow means; DeepSpeed multiplies, divides, and
keeps the scale in its checkpoints. Imports no DeepSpeed: a scaler is its `DynamicLossScaler`.

An overflow is no fault of the data or the model: the same update is made again at half the scale. Only at the smallest
scale is the gradient itself what is not finite.
"""

from __future__ import annotations

from typing import Any

import torch

FIRST_POWER = 16  # of two: the scale a run begins with, as in PyTorch's and DeepSpeed's defaults
SMALLEST = 1
WINDOW = 200  # updates without an overflow after which the scale is doubled


def fp16_section(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's `fp16` section. Its own growth is switched off: it doubles the scale before it divides the gradient
    by it, so that this one update is made of half the gradient (measured with 0.19.8; docs/notes/lab-notes.md)."""
    if dtype is not torch.float16:
        return {"enabled": False}
    return {
        "enabled": True,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": FIRST_POWER,
        "min_loss_scale": SMALLEST,
        "hysteresis": 1,  # every overflow halves
        "loss_scale_window": 2**62,
    }


def scale_of_step(scaler: Any) -> float:
    """The scale that the gradient of the step that begins was made at. From here on an overflow at the smallest one
    comes back to us, who can say which rollouts it comes from; DeepSpeed would end the process."""
    scaler.raise_error_at_min_scale = False  # here and not once: a checkpoint brings a scaler of its own
    return float(scaler.cur_scale)


def settle(scaler: Any, *, scale: float, overflow: bool) -> bool:
    """After a step at `scale`: whether it overflowed and can be made again at half the scale, which DeepSpeed has set.
    The scale is doubled here when enough updates were made since the last overflow. Where even the smallest scale
    overflows it is not to blame, and starts again."""
    if overflow and scale > SMALLEST:
        return True
    updates = scaler.cur_iter - scaler.last_overflow_iter - 1
    if overflow:
        scaler.cur_scale = 2.0**FIRST_POWER
    elif updates > 0 and updates % WINDOW == 0:
        scaler.cur_scale *= scaler.scale_factor
    return False
