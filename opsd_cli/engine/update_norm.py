"""How far an update of AdamW has moved the weights: from the optimizer's own moments, without a copy of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_cli.settings.config import OptimSettings

PIECE = 2**24  # numbers looked at together: a partition may hold all weights of a model


def squared_update(optimizer: torch.optim.Optimizer, *, lr: float, settings: OptimSettings) -> float:
    """The sum of (w_after - w_before)^2 over the weights that this process's optimizer holds, for the update it has
    just made at `lr`. With k = lr * weight_decay and Adam's step u, w_after = (1 - k) * w_before - u, so the difference
    is -(u + k * w_after) / (1 - k)."""
    held = [(weight, state) for weight, state in optimizer.state.items() if "exp_avg" in state]
    if not held:
        return 0.0
    decay, sums = lr * settings.weight_decay, []
    # A GPU is waited for twice, however many weights there are.
    counts = torch.stack([state["step"] for _, state in held]).tolist()
    for (weight, state), count in zip(held, counts, strict=True):
        corrections = tuple(1.0 - beta**count for beta in settings.betas)
        flat = [tensor.detach().view(-1) for tensor in (state["exp_avg"], state["exp_avg_sq"], weight)]
        for mean_m, square_m, weight_m in zip(*(tensor.split(PIECE) for tensor in flat), strict=True):
            moved_m = adam_step(mean_m, square_m, corrections, eps=settings.eps).mul_(lr)
            if decay:
                moved_m.add_(weight_m, alpha=decay).div_(1.0 - decay)
            sums.append(moved_m.square_().sum(dtype=torch.float64))
    return float(torch.stack(sums).sum())


def adam_step(mean_m: Tensor, square_m: Tensor, corrections: tuple[float, ...], *, eps: float) -> Tensor:
    """Adam's step for a learning rate of 1, [m]: the corrected mean over the root of the corrected square."""
    of_mean, of_square = corrections
    return (mean_m / of_mean).div_((square_m / of_square).sqrt_().add_(eps))
