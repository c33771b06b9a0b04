"""Drawing one token: exactly the likeliest remain, what has no probability is never drawn, and a CPU's completions stay
what they were."""

from __future__ import annotations

import math

import pytest
import torch
from drawing_check import check_drawing, distribution, sums_in_parallel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsd_cli.sampling.token_sampling import draw_token
from opsd_cli.settings.config import SamplingSettings


def sampling(*, top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> SamplingSettings:
    return SamplingSettings(max_completion_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)


def kept(logits: Tensor, **how) -> list[int]:
    return torch.isfinite(distribution(logits.unsqueeze(0), **how)[0]).nonzero().flatten().tolist()


def test_truncation_keeps_exactly_the_likeliest_tokens():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[torch.tensor([2, 0, 3, 1])]
    assert kept(logits, top_k=2, top_p=1.0) == [1, 3]
    assert kept(logits, top_k=0, top_p=0.5) == [1]
    assert kept(logits, top_k=0, top_p=0.51) == [1, 3]
    assert kept(logits, top_k=0, top_p=1.0) == [0, 1, 2, 3]
    assert kept(logits, top_k=9, top_p=0.9) == [0, 1, 3]
    assert kept(logits, top_k=0, top_p=1e-9) == [1]
    assert kept(logits, top_k=3, top_p=0.6) == [1, 3]


def test_of_equally_likely_tokens_those_with_the_lowest_ids_remain():
    logits = torch.tensor([0.0, 2.0, -0.0, 1.0, 0.0, 0.0, -1.0])
    assert kept(logits, top_k=4, top_p=1.0) == [0, 1, 2, 3]
    assert kept(torch.zeros(6), top_k=0, top_p=0.5) == [0, 1, 2]
    coarse = torch.randn(64, 2000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for row in coarse:
        expected = sorted(range(2000), key=lambda i, row=row: (-float(row[i]), i))[:20]
        assert kept(row, top_k=20, top_p=1.0) == sorted(expected)


@settings(max_examples=200, deadline=None)
@given(
    levels=st.lists(
        st.sampled_from([-math.inf, -300.0, -2.5, -0.0, 0.0, 0.5, 3.0, 3.0000002]), min_size=2, max_size=14
    ),
    top_k=st.integers(0, 16),
    top_p=st.floats(0.01, 1.0),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
    seed=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_a_token_is_drawn_by_inverting_the_distribution_of_those_that_remain(
    levels, top_k, top_p, temperature, uniform, seed
):
    """Against float64, with exact sums and with sums as of a GPU."""
    assume(max(levels) > -math.inf)
    logits = torch.tensor(levels)
    scaled = [float(value) for value in (logits / temperature).double()]
    order = sorted(range(len(levels)), key=lambda i: (-scaled[i], i))[: top_k or None]
    weights = {i: math.exp(scaled[i] - max(scaled)) for i in order}
    before = 0.0
    remain = []
    for i in order:
        assume(top_p == 1.0 or abs(before / sum(weights.values()) - top_p) > 1e-5)  # either is right
        if before / sum(weights.values()) < top_p and weights[i] > 0:
            remain.append(i)
        before += weights[i]
    how = sampling(top_k=top_k, top_p=top_p, temperature=temperature)
    uniform_1 = torch.tensor([uniform], dtype=torch.float32)
    if seed is None:
        token, logprob = draw_token(logits.unsqueeze(0), how, uniform_1)
    else:
        with sums_in_parallel(seed):
            token, logprob = draw_token(logits.unsqueeze(0), how, uniform_1)
    assert int(token) in remain
    mass = sum(weights[i] for i in remain)
    assert float(logprob) == pytest.approx(math.log(weights[int(token)] / mass), abs=1e-4)
    below = sum(weights[i] for i in remain if i < int(token)) / mass
    assert below - 1e-5 <= uniform <= below + weights[int(token)] / mass + 1e-5


@pytest.mark.parametrize(
    "how",
    [sampling(top_k=20), sampling(top_p=0.95), sampling(top_p=1e-9), sampling()],
    ids=["top-k", "top-p", "one token", "all"],
)
def test_a_sum_that_is_not_monotone_lets_no_token_without_probability_through(how: SamplingSettings):
    """Thresholds at every level of the cumulative sum and one digit beside it: there a last digit decides."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.full((4096,), -200.0)  # of probability 0 in fp32, even where nothing is truncated
    logits[torch.randperm(4096, generator=generator)[:20]] = torch.randn(20, generator=generator)
    levels = logits.softmax(0).cumsum(0).unique()
    uniform = torch.cat([levels, levels.nextafter(torch.tensor(0.0)), levels.nextafter(torch.tensor(2.0))])
    uniform = uniform.clamp(0, 1 - 2**-24).repeat(8)
    with sums_in_parallel(0):
        token, logprob = draw_token(logits.expand(len(uniform), -1), how, uniform)
    assert torch.isfinite(logprob).all()
    assert (logits[token] > -200).all()


@pytest.mark.slow
def test_ten_million_draws_from_a_large_vocabulary_never_give_a_token_without_probability():
    check_drawing(torch.device("cpu"))


@pytest.mark.parametrize("vocabulary", [1024, 151_936])
def test_from_the_whole_vocabulary_a_cpu_draws_what_one_cumulative_sum_gives(vocabulary: int):
    """The stream of completions of a seed: one uniform number, one search in the running sum, first id first."""
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(8, vocabulary, generator=generator)
    cumulative = logits.softmax(1).cumsum(1)
    for _ in range(50):
        uniform = torch.rand(8, generator=generator)
        expected = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
        assert torch.equal(draw_token(logits, sampling(), uniform)[0], expected)


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -1.5]]).expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for how in (sampling(), sampling(top_k=4)):
        drawn, _ = draw_token(logits, how, uniform)
        expected = distribution(logits[:1], top_k=how.top_k, top_p=1.0)[0].softmax(-1) * 20_000
        counts = torch.bincount(drawn, minlength=5)
        seen = expected > 0
        chi_square = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
        assert chi_square < 18.5  # the 0.1 % point for four degrees of freedom
        assert int(counts[~seen].sum()) == 0
