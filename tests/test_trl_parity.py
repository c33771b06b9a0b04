"""Losses and gradients against TRL's self-distillation losses, for every setting that both have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL, SampledToken
from opsd_cli.loss.support import restrict_support
from opsd_cli.loss.token_factors import Importance
from opsd_cli.settings.config import SupportSettings

pytestmark = pytest.mark.slow

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ALPHAS = {0.0: ForwardKL(), 0.3: GeneralizedJSD(beta=0.3, normalize=False), 1.0: ReverseKL()}
"""TRL's distillation_alpha -> ours: 0 is forward, 1 is reverse, as everywhere."""


@pytest.fixture(scope="module")
def trl():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        return pytest.importorskip("trl.experimental.sdft.loss_utils")


def random_logits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(6, 15, generator=generator, dtype=torch.double) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(0, 15, (6,), generator=generator)


def assert_same(divergence: Divergence, theirs: Tensor, student: Tensor, teacher: Tensor, targets: Tensor) -> None:
    (gradient,) = torch.autograd.grad(theirs.sum(), student)
    tokens = AlignedTokens(student.detach().log_softmax(-1), teacher.log_softmax(-1), targets)
    value, ours = divergence.value_and_gradient(tokens)
    torch.testing.assert_close(value, theirs.detach(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", range(3))
def test_the_full_vocabulary_loss_is_trls(trl, alpha: float, seed: int):
    student, teacher, targets = random_logits(seed)
    theirs = trl.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
    assert_same(ALPHAS[alpha], theirs, student, teacher, targets)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_students_top_k_is_trls(trl, alpha: float, tail: bool):
    student, teacher, targets = random_logits(4)
    theirs = trl.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=5, distillation_alpha=alpha, distillation_add_tail=tail
    )
    settings = SupportSettings(side="student", k=5, rest="tail" if tail else "renormalise")
    assert_same(restrict_support(ALPHAS[alpha], settings), theirs, student, teacher, targets)


def test_the_sampled_token_loss_is_trls(trl):
    student, teacher, targets = random_logits(5)
    theirs = trl.compute_sampled_token_self_distillation_loss(student, teacher, targets, distillation_alpha=1.0)
    assert_same(SampledToken(), theirs, student, teacher, targets)


def test_the_importance_factor_is_trls(trl):
    student, teacher, targets = random_logits(6)
    tokens = AlignedTokens(student.detach().log_softmax(-1), teacher.log_softmax(-1), targets)
    now = tokens.at_target(tokens.student_logprobs_nV)
    sampler = now + torch.linspace(-2, 2, 6, dtype=torch.double)
    theirs = trl.apply_importance_sampling_clipping(torch.ones(6), now, sampler, clip_coeff=2.0)
    torch.testing.assert_close(Importance(sampler, 2.0)(tokens, slice(0, 6)), theirs, check_dtype=False)
