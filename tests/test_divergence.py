"""Every divergence against its formula, finite differences, and other people's implementations."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.rollout.opsd import generalized_jsd_loss
from divergence_table import DIVERGENCES, FORMULAS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import opsd_cli.plugins  # noqa: F401
from opsd_cli.loss.aligned import AlignedTokens, through_softmax
from opsd_cli.loss.clip import apply_clip
from opsd_cli.loss.divergences import Divergence, Entrywise, ForwardKL, GeneralizedJSD, ReverseKL, SampledToken
from opsd_cli.loss.support import restrict_support
from opsd_cli.settings.config import ClipSettings, SupportSettings
from opsd_cli.settings.registry import plugin_names

EXACT = {name: one for name, one in DIVERGENCES.items() if name not in ("sampled_token", "cross_entropy")}


def random_tokens(seed: int, *, n: int = 4, v: int = 9, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (scale * torch.randn(n, v, generator=generator, dtype=torch.double) for _ in range(2))
    return logits, teacher.log_softmax(-1), torch.randint(0, v, (n,), generator=generator)


def evaluate(divergence: Divergence, logits: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return divergence.value_and_gradient(AlignedTokens(logits.log_softmax(-1), teacher, targets))


def test_every_registered_divergence_is_tested_here():
    assert {type(divergence).plugin_name for divergence in DIVERGENCES.values()} == set(plugin_names("divergence"))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 8.0))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_equal_autograd_of_the_formula(name: str, seed: int, scale: float):
    logits, teacher, targets = random_tokens(seed, scale=scale)
    logits.requires_grad_()
    expected = FORMULAS[name](logits.log_softmax(-1), teacher, targets)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, gradient = evaluate(DIVERGENCES[name], logits.detach(), teacher, targets)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "total_variation"])
def test_the_gradient_equals_finite_differences(name: str):
    logits, teacher, targets = random_tokens(7)
    _, gradient = evaluate(EXACT[name], logits, teacher, targets)
    step = 1e-6
    for v in range(logits.shape[1]):
        moved = torch.zeros_like(logits)
        moved[:, v] = step
        above, below = (evaluate(EXACT[name], logits + sign * moved, teacher, targets)[0] for sign in (1, -1))
        torch.testing.assert_close((above - below) / (2 * step), gradient[:, v], rtol=1e-5, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 8.0))
@pytest.mark.parametrize("name", EXACT)
def test_it_is_never_negative_and_zero_at_equality(name: str, seed: int, scale: float):
    logits, teacher, targets = random_tokens(seed, scale=scale)
    assert torch.all(evaluate(EXACT[name], logits, teacher, targets)[0] >= -1e-12)
    value, gradient = evaluate(EXACT[name], logits, logits.log_softmax(-1), targets)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name, one in EXACT.items() if isinstance(one, Entrywise)])
def test_entries_sum_to_the_value_and_carry_the_gradient(name: str):
    logits, teacher, targets = random_tokens(11)
    divergence = EXACT[name]
    assert isinstance(divergence, Entrywise)
    tokens = AlignedTokens(logits.log_softmax(-1), teacher, targets)
    contribution, raw = divergence.entries(tokens)
    value, gradient = divergence.value_and_gradient(tokens)
    torch.testing.assert_close(contribution.sum(-1), value)
    torch.testing.assert_close(through_softmax(raw, tokens.student_probs_nV), gradient)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_it_stays_exact_where_probabilities_vanish_in_single_precision(name: str):
    logits, teacher, targets = random_tokens(5, n=6, v=40, scale=80.0)
    value, gradient = evaluate(EXACT[name], logits, teacher, targets)
    value_single, gradient_single = evaluate(EXACT[name], logits.float(), teacher.float(), targets)
    torch.testing.assert_close(value_single.double(), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_single.double(), gradient, rtol=1e-4, atol=1e-4)


def test_jsd_meets_the_two_kls_at_its_ends_once_normalized():
    logits, teacher, targets = random_tokens(3)
    for beta, end in ((1e-5, ForwardKL()), (1 - 1e-5, ReverseKL())):
        near, _ = evaluate(GeneralizedJSD(beta=beta, normalize=True), logits, teacher, targets)
        torch.testing.assert_close(near, evaluate(end, logits, teacher, targets)[0], rtol=1e-3, atol=1e-6)


def test_the_sampled_token_gradient_is_the_reverse_kls_in_expectation():
    logits, teacher, _ = random_tokens(5, n=1, v=6)
    rows = logits.expand(6, -1)
    _, each = evaluate(SampledToken(), rows, teacher.expand(6, -1), torch.arange(6))
    expected = (logits.softmax(-1).T * each).sum(0, keepdim=True)
    torch.testing.assert_close(expected, evaluate(ReverseKL(), logits, teacher, torch.zeros(1, dtype=torch.long))[1])


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_loss_and_gradient_equal_deepspeeds_generalized_jsd(
    name: str, beta: float, temperature: float, top_k: int | None, clip: float | None
):
    generator = torch.Generator().manual_seed(2)
    student, teacher = (3 * torch.randn(2, 7, 13, generator=generator, dtype=torch.double) for _ in range(2))
    student.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 1]])
    theirs = generalized_jsd_loss(
        student, teacher, mask, beta=beta, temperature=temperature, teacher_top_k=top_k, pointwise_clip=clip
    )
    theirs.loss.backward()

    rows = mask.bool()
    tokens = AlignedTokens(
        (student.detach()[rows] / temperature).log_softmax(-1),
        (teacher[rows] / temperature).log_softmax(-1),
        torch.zeros(int(mask.sum()), dtype=torch.long),
    )
    side = "full" if top_k is None else "teacher"
    divergence = restrict_support(
        apply_clip(EXACT[name], ClipSettings(kind="none" if clip is None else "entry", limit=clip or 1.0)),
        SupportSettings(side=side, k=top_k or 1, rest="renormalise"),
    )
    value, gradient = divergence.value_and_gradient(tokens)
    assert float(value.mean()) == pytest.approx(float(theirs.loss.detach()), rel=1e-5)
    torch.testing.assert_close(gradient / temperature / len(value), student.grad[rows], rtol=1e-5, atol=1e-9)
