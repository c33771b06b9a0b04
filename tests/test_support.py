"""Part of the vocabulary: values and gradients against the formulas written out, and what bounds what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.divergences import CrossEntropy, ForwardKL, GeneralizedJSD, ReverseKL, SampledToken
from opsd_cli.loss.support import restrict_support
from opsd_cli.settings.config import SupportSettings
from opsd_cli.settings.errors import ConfigError

DIVERGENCES = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": GeneralizedJSD(beta=0.3, normalize=False),
}


def plain(name: str, ls: Tensor, lt: Tensor) -> Tensor:
    """The divergence of log-probabilities (or of parts of them), summed over the last axis."""
    p, q = ls.exp(), lt.exp()
    if name == "forward_kl":
        return (q * (lt - ls)).sum(-1)
    if name == "reverse_kl":
        return (p * (ls - lt)).sum(-1)
    m = (0.3 * q + 0.7 * p).log()
    return (0.3 * q * (lt - m) + 0.7 * p * (ls - m)).sum(-1)


def chosen(row_s: Tensor, row_t: Tensor, side: str, k: int) -> list[int]:
    tops = {"teacher": row_t.topk(k).indices.tolist(), "student": row_s.topk(k).indices.tolist()}
    return sorted(set(tops["teacher"]) | set(tops["student"])) if side == "union" else tops[side]


def written_out(name: str, ls: Tensor, lt: Tensor, side: str, k: int, rest: str) -> Tensor:
    """One row at a time, with sets instead of masks."""
    values = []
    for row_s, row_t in zip(ls, lt, strict=True):
        inside = chosen(row_s, row_t, side, k)
        outside = [v for v in range(len(row_s)) if v not in inside]
        s, t = row_s[inside], row_t[inside]
        if rest == "renormalise":
            s, t = s.log_softmax(-1), t.log_softmax(-1)
        if rest == "tail":
            s, t = (torch.cat([a, b[outside].logsumexp(-1, keepdim=True)]) for a, b in ((s, row_s), (t, row_t)))
        values.append(plain(name, s, t))
    return torch.stack(values)


def random_pair(seed: int, n: int = 5, v: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (2 * torch.randn(n, v, generator=generator, dtype=torch.double) for _ in range(2))
    return logits.requires_grad_(), teacher.log_softmax(-1), torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("rest", ["renormalise", "tail", "drop"])
@pytest.mark.parametrize("side", ["teacher", "student", "union"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_equal_the_formula_over_the_chosen_set(name: str, side: str, rest: str):
    logits, teacher, targets = random_pair(3)
    divergence = restrict_support(DIVERGENCES[name], SupportSettings(side=side, k=4, rest=rest))
    with torch.no_grad():
        value, gradient = divergence.value_and_gradient(AlignedTokens(logits.log_softmax(-1), teacher, targets))
    expected = written_out(name, logits.log_softmax(-1), teacher, side, 4, rest)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 11), side=st.sampled_from(["teacher", "student", "union"]))
def test_a_tail_bucket_never_exceeds_the_full_divergence(seed: int, k: int, side: str):
    logits, teacher, targets = random_pair(seed)
    tokens = AlignedTokens(logits.detach().log_softmax(-1), teacher, targets)
    for divergence in DIVERGENCES.values():
        full, _ = divergence.value_and_gradient(tokens)
        part, _ = restrict_support(divergence, SupportSettings(side=side, k=k, rest="tail")).value_and_gradient(tokens)
        assert torch.all(part <= full + 1e-9)
        assert torch.all(part >= -1e-9)


def test_k_of_the_whole_vocabulary_is_the_full_divergence():
    logits, teacher, targets = random_pair(5)
    tokens = AlignedTokens(logits.detach().log_softmax(-1), teacher, targets)
    whole = restrict_support(ReverseKL(), SupportSettings(side="student", k=12, rest="tail"))
    torch.testing.assert_close(whole.value_and_gradient(tokens), ReverseKL().value_and_gradient(tokens))


def test_equal_distributions_are_at_zero_whatever_the_support():
    logits, _, targets = random_pair(6)
    same = logits.detach().log_softmax(-1)
    for rest in ("renormalise", "tail", "drop"):
        for divergence in DIVERGENCES.values():
            part = restrict_support(divergence, SupportSettings(side="union", k=3, rest=rest))
            value, gradient = part.value_and_gradient(AlignedTokens(same, same, targets))
            torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
            if rest != "drop" or isinstance(divergence, GeneralizedJSD):
                torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


AT_THE_SAMPLED_TOKEN = {
    "sampled_token": (SampledToken(), lambda s, t, y: -(t[y] - s[y]).detach() * s[y]),
    "cross_entropy": (CrossEntropy(), lambda s, t, y: -s[y]),
}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 11), side=st.sampled_from(["teacher", "student", "union"]))
@pytest.mark.parametrize("name", AT_THE_SAMPLED_TOKEN)
def test_with_a_tail_the_sampled_token_is_found_in_its_own_column_or_in_the_tails(
    name: str, seed: int, k: int, side: str
):
    logits, teacher, targets = random_pair(seed)
    divergence, formula = AT_THE_SAMPLED_TOKEN[name]
    part = restrict_support(divergence, SupportSettings(side=side, k=k, rest="tail"))
    with torch.no_grad():
        value, gradient = part.value_and_gradient(AlignedTokens(logits.log_softmax(-1), teacher, targets))
    expected = []
    for row_s, row_t, target in zip(logits.log_softmax(-1), teacher, targets.tolist(), strict=True):
        inside = chosen(row_s, row_t, side, k)
        outside = [v for v in range(len(row_s)) if v not in inside]
        s, t = (torch.cat([row[inside], row[outside].logsumexp(-1, keepdim=True)]) for row in (row_s, row_t))
        expected.append(formula(s, t, inside.index(target) if target in inside else len(inside)))
    (expected_gradient,) = torch.autograd.grad(torch.stack(expected).sum(), logits)
    torch.testing.assert_close(value, torch.stack(expected).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AT_THE_SAMPLED_TOKEN)
def test_a_tail_of_one_token_is_the_full_divergence(name: str, dtype: torch.dtype):
    logits, teacher, targets = random_pair(7)
    tokens = AlignedTokens(logits.detach().log_softmax(-1).to(dtype), teacher.to(dtype), targets)
    divergence, _ = AT_THE_SAMPLED_TOKEN[name]
    part = restrict_support(divergence, SupportSettings(side="student", k=11, rest="tail"))
    torch.testing.assert_close(part.value_and_gradient(tokens), divergence.value_and_gradient(tokens))


@pytest.mark.parametrize("rest", ["renormalise", "drop"])
def test_a_sampled_token_that_may_be_left_out_is_refused_and_not_looked_up_elsewhere(rest: str):
    logits, teacher, targets = random_pair(8)
    tokens = AlignedTokens(logits.detach().log_softmax(-1), teacher, targets)

    class AtTarget(ForwardKL):
        def entries(self, few: AlignedTokens) -> tuple[Tensor, Tensor]:
            few.at_target(few.log_ratio_nV)
            return super().entries(few)

    part = restrict_support(AtTarget(), SupportSettings(side="student", k=4, rest=rest))
    with pytest.raises(ConfigError, match=r"may leave out the sampled token.*use support.rest=tail or support=full"):
        part.value_and_gradient(tokens)


def test_dropping_the_rest_needs_a_sum_over_the_vocabulary():
    with pytest.raises(ConfigError, match="sum over the vocabulary"):
        restrict_support(SampledToken(), SupportSettings(side="teacher", k=3, rest="drop"))
