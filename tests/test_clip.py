"""Clips: the published one with its wrong sign, and the two that keep the direction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.clip import apply_clip
from opsd_cli.loss.divergences import CrossEntropy, ForwardKL, ReverseKL
from opsd_cli.settings.config import ClipSettings
from opsd_cli.settings.errors import ConfigError


def pair(seed: int, n: int = 6, v: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (2 * torch.randn(n, v, generator=generator, dtype=torch.double) for _ in range(2))
    return logits.requires_grad_(), teacher.log_softmax(-1), torch.randint(0, v, (n,), generator=generator)


def aligned(logits: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> AlignedTokens:
    return AlignedTokens(logits.detach().log_softmax(-1), teacher, targets)


def test_the_entry_clip_is_the_published_formula_with_its_gradient():
    logits, teacher, targets = pair(1)
    value, gradient = apply_clip(ForwardKL(), ClipSettings(kind="entry", limit=0.05)).value_and_gradient(
        aligned(logits, teacher, targets)
    )
    student = logits.log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).clamp(max=0.05).sum(-1)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_entry_clip_pushes_away_from_the_token_the_teacher_prefers():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.double)
    teacher = torch.tensor([[2.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.double).log_softmax(-1)
    tokens = AlignedTokens(logits.log_softmax(-1), teacher, torch.tensor([0]))
    _, plain = ForwardKL().value_and_gradient(tokens)
    value, entry = apply_clip(ForwardKL(), ClipSettings(kind="entry", limit=0.05)).value_and_gradient(tokens)
    assert plain[0, 0] < 0 < entry[0, 0]
    assert value[0] < 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.floats(0.001, 1.0))
def test_the_neutral_clip_gives_clipped_entries_no_gradient_and_no_negative_loss(seed: int, limit: float):
    logits, teacher, targets = pair(seed)
    tokens = aligned(logits, teacher, targets)
    value, gradient = apply_clip(ForwardKL(), ClipSettings(kind="neutral", limit=limit)).value_and_gradient(tokens)
    over = ForwardKL().entries(tokens)[0] > limit
    assert torch.all(gradient[over] == 0)
    assert torch.all(value >= -1e-9)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(gradient), dtype=torch.double), atol=1e-9, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.floats(0.01, 2.0))
def test_the_token_clip_keeps_the_direction_and_bounds_the_value(seed: int, limit: float):
    logits, teacher, targets = pair(seed)
    tokens = aligned(logits, teacher, targets)
    for divergence in (ForwardKL(), ReverseKL()):
        value, gradient = divergence.value_and_gradient(tokens)
        less, smaller = apply_clip(divergence, ClipSettings(kind="token", limit=limit)).value_and_gradient(tokens)
        assert torch.all(less <= limit + 1e-9)
        torch.testing.assert_close(less, value.clamp(max=limit))
        torch.testing.assert_close(smaller * value.unsqueeze(1), gradient * less.unsqueeze(1))


def test_no_clip_is_the_divergence_itself():
    divergence = ForwardKL()
    assert apply_clip(divergence, ClipSettings(kind="none", limit=1.0)) is divergence


@pytest.mark.parametrize(("divergence", "kind"), [(ReverseKL(), "neutral"), (CrossEntropy(), "entry")])
def test_a_clip_that_is_not_defined_is_refused(divergence, kind: str):
    with pytest.raises(ConfigError, match=f"clip.kind={kind}"):
        apply_clip(divergence, ClipSettings(kind=kind, limit=0.1))
