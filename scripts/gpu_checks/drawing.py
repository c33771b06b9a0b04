"""Tokens drawn by the million from a large vocabulary: none that cannot be drawn, each as often as its probability
says, and the same ones as on a CPU."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from gpu_checks.check import Bench, Check, Figure, Found
from opsd_cli.sampling.token_sampling import draw_token
from opsd_cli.settings.config import SamplingSettings

KEPT = 20
SAMPLING = SamplingSettings(max_completion_tokens=1, temperature=0.8, top_p=0.95, top_k=KEPT)
MOST_DRAWS, MOST_SECONDS = 10_000_000, 30.0
DEVIATIONS = 5.0  # of a chi-square statistic from its mean; in a right sampler once in three million runs
DIFFERENT = 1e-3  # share of draws whose number falls between two ways of rounding


def checks(bench: Bench) -> list[Check]:
    return [
        Check("millions of draws", partial(millions, bench)),
        Check("the tokens of a CPU", partial(same_as_cpu, bench), "on a card only: it compares with a CPU"),
        Check("cumulative sums that fall", partial(falls, bench)),
    ]


def logits_of(bench: Bench, rows: int) -> Tensor:
    """Rows that differ, in fp32: a real model's width on a card."""
    generator = torch.Generator(device=bench.device).manual_seed(3)
    vocabulary = 1024 if bench.is_small else 262_144
    return 3.0 * torch.randn(rows, vocabulary, generator=generator, device=bench.device)


def millions(bench: Bench) -> Found:
    """As many draws as there is time for, in a row of its own each; counted by the rank of the token."""
    logits_BV = logits_of(bench, 32 if bench.is_small else 1024)
    most, seconds = (5_000, 3.0) if bench.is_small else (MOST_DRAWS, MOST_SECONDS)
    best_BK, place_BK = (logits_BV.double() / SAMPLING.temperature).topk(KEPT, dim=1)
    probs_BK = best_BK.softmax(dim=1)
    kept_BK = probs_BK.cumsum(dim=1) - probs_BK < SAMPLING.top_p
    probs_BK = (probs_BK * kept_BK) / (probs_BK * kept_BK).sum(dim=1, keepdim=True)
    counts_BK, drawn, infinite = torch.zeros_like(probs_BK), 0, 0
    generator = torch.Generator(device=bench.device).manual_seed(11)
    start = time.perf_counter()
    while drawn < most and time.perf_counter() - start < seconds:
        uniform_B = torch.rand(len(logits_BV), generator=generator, device=bench.device)
        token_B, logprob_B = draw_token(logits_BV, SAMPLING, uniform_B)
        counts_BK += (place_BK == token_B.unsqueeze(1)) & kept_BK
        infinite += int((~logprob_B.isfinite()).sum())
        drawn += len(logits_BV)
    impossible = drawn - int(counts_BK.sum())
    expected_BK = probs_BK * (drawn / len(logits_BV))
    usable_BK = expected_BK >= 5  # else the statistic is no chi-square
    chi = ((counts_BK - expected_BK)[usable_BK].square() / expected_BK[usable_BK]).sum()
    freedom = float((1.0 - probs_BK)[usable_BK].sum())  # the mean of one such term is 1 - p
    deviation = abs(float(chi) - freedom) / (2.0 * max(freedom, 1.0)) ** 0.5
    figures = (
        Figure("impossible tokens", impossible, 0), Figure("infinite log-probabilities", infinite, 0),
        Figure("chi-square deviations", deviation, DEVIATIONS), Figure("draws", drawn),
    )  # fmt: skip
    return Found(figures)


def same_as_cpu(bench: Bench) -> Found:
    logits_BV = logits_of(bench, 64)
    different = total = 0
    for seed in range(20):
        uniform_B = torch.rand(len(logits_BV), generator=torch.Generator().manual_seed(seed))
        here_B, _ = draw_token(logits_BV, SAMPLING, uniform_B.to(bench.device))
        there_B, _ = draw_token(logits_BV.cpu(), SAMPLING, uniform_B)
        different += int((here_B.cpu() != there_B).sum())
        total += len(logits_BV)
    return Found((Figure("share that differs", different / total, DIFFERENT),))


def falls(bench: Bench) -> Found:
    """Whether this device's cumulative sum of probabilities ever falls: information, since drawing must not need it."""
    cumulative_BV = logits_of(bench, 32).softmax(dim=1).cumsum(dim=1)
    return Found((Figure("falls", int((cumulative_BV.diff(dim=1) < 0).sum())),))
