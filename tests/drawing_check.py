"""The check of token drawing that test_token_sampling runs on a CPU and that runs unchanged on a GPU, and an imitation
on a CPU of a GPU's sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from opsd_cli.sampling.token_sampling import invert_cumulative, truncate_logits

VOCABULARY = 262_144


def distribution(logits_BV: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """The logits that are drawn from, [B, V], with what is never drawn at -inf."""
    logits_BK, id_BK = truncate_logits(logits_BV, top_k=top_k, top_p=top_p)
    if id_BK is None:
        return logits_BK
    return torch.full_like(logits_BV, -torch.inf).scatter(1, id_BK, logits_BK)


def check_drawing(device: torch.device, draws: int = 10_000_000) -> None:
    """So many draws from a large vocabulary, after top-k and top-p and from all of it, where most of it has probability
    0 in fp32: no token of probability 0, no log-probability that is not finite, and frequencies as they should be."""
    generator = torch.Generator().manual_seed(0)
    noise_BV = torch.randn(4, VOCABULARY, generator=generator).to(device)
    uniform_BN = torch.rand(4, draws // 4, generator=generator).to(device)
    for spread, top_k, top_p in ((3.0, 20, 0.95), (40.0, 0, 1.0)):
        logits_BK, _ = truncate_logits(noise_BV * spread, top_k=top_k, top_p=top_p)
        probs_BK = logits_BK.softmax(dim=1)
        place_BN = invert_cumulative(probs_BK, uniform_BN)
        drawn_BN = probs_BK.gather(1, place_BN)
        assert bool((drawn_BN > 0).all())
        assert bool(drawn_BN.log().isfinite().all())
        likeliest_B1 = probs_BK.argmax(dim=1, keepdim=True)
        share_B = (place_BN == likeliest_B1).double().mean(dim=1)
        expected_B = probs_BK.gather(1, likeliest_B1).squeeze(1).double()
        error_B = (expected_B * (1 - expected_B) / place_BN.shape[1]).sqrt() + 1e-6
        assert bool(((share_B - expected_B).abs() < 5 * error_B).all())


@contextmanager
def sums_in_parallel(seed: int) -> Iterator[None]:
    """Cumulative sums of floating-point numbers whose last digit may be one off either way, as a parallel scan's."""
    generator, real = torch.Generator().manual_seed(seed), torch.Tensor.cumsum

    def cumsum(self: Tensor, dim: int, **more: object) -> Tensor:
        sums = real(self, dim, **more)
        if not sums.is_floating_point():
            return sums
        steps = torch.randint(-1, 2, sums.shape, generator=generator)
        return torch.where(steps == 0, sums, torch.nextafter(sums, steps * torch.inf))

    torch.Tensor.cumsum = cumsum
    try:
        yield
    finally:
        torch.Tensor.cumsum = real
