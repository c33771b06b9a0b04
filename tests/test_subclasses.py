"""What a researcher's own divergence gets, made from a built-in one or from nothing: its own formula on every device
and under every setting, or a refusal that says so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from recipe_support import config_of
from test_support import random_pair
from torch import Tensor

from opsd_cli.engine.device import card_of
from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.chunk_rows import LossInputs, fits, numbers_of
from opsd_cli.loss.chunked_head import distill, try_out
from opsd_cli.loss.clip import apply_clip
from opsd_cli.loss.divergences import (
    CrossEntropy,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SampledToken,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    is_sum_of_entries,
)
from opsd_cli.loss.support import restrict_support
from opsd_cli.loss.types import Head, TokenScores
from opsd_cli.rank.run_data import load_run_data
from opsd_cli.settings.config import ClipSettings, SupportSettings
from opsd_cli.settings.errors import ConfigError

BUILT_IN = [
    ForwardKL(), ReverseKL(), GeneralizedJSD(beta=0.3, normalize=True), SkewForwardKL(alpha=0.1),
    SkewReverseKL(alpha=0.1), TotalVariation(), SampledToken(), CrossEntropy(),
]  # fmt: skip
FULL = SupportSettings(side="full", k=3, rest="tail")


class DoubleValue(ForwardKL):
    """Redefines the closed form only."""

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        value_n, gradient_nV = super().value_and_gradient(tokens)
        return 2.0 * value_n, 2.0 * gradient_nV


class DoubleEntries(ForwardKL):
    """Redefines the entries only."""

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        contribution_nV, gradient_nV = super().entries(tokens)
        return 2.0 * contribution_nV, 2.0 * gradient_nV


@dataclass(frozen=True)
class Own:
    """No base class: the teacher's probability of the sampled token times the student's surprise at it."""

    plugin_name = "own"
    needs_teacher = True

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        share_n = tokens.at_target(tokens.teacher_probs_nV)
        gradient_nV = share_n.unsqueeze(1) * tokens.student_probs_nV
        gradient_nV.scatter_add_(1, tokens.target_ids_n.unsqueeze(1), -share_n.unsqueeze(1))
        return -share_n * tokens.at_target(tokens.student_logprobs_nV), gradient_nV


def aligned(seed: int = 2) -> AlignedTokens:
    logits, teacher, targets = random_pair(seed)
    return AlignedTokens(logits.detach().log_softmax(-1), teacher, targets)


@pytest.mark.parametrize("divergence", BUILT_IN, ids=lambda one: type(one).plugin_name)
def test_a_kernel_is_for_one_class_and_not_for_what_is_made_from_it(divergence):
    made = type("Made", (type(divergence),), {})(**vars(divergence))
    assert numbers_of(divergence) is not None
    assert numbers_of(made) is None
    hidden, head = torch.randn(3, 4), Head(torch.randn(9, 4), None)
    jobs = [
        LossInputs(head, TokenScores(hidden, None), torch.tensor([0, 1, 8]), torch.ones(3), one, 1.0, 2**20, (), False)
        for one in (divergence, made)
    ]
    assert [fits(job) for job in jobs] == [True, False]


@pytest.mark.parametrize("own", [DoubleValue(), DoubleEntries()])
def test_the_loss_is_the_subclasss_own_whichever_method_it_redefines(own: Divergence):
    student, teacher = torch.randn(2, 3, 4)
    head, ids = Head(torch.randn(9, 4), None), torch.tensor([0, 1, 8])
    plain, doubled = (
        distill(student, LossInputs(head, TokenScores(teacher, None), ids, torch.ones(3), divergence, 1.0, 2**20))
        for divergence in (ForwardKL(), own)
    )
    torch.testing.assert_close(doubled.value_N, 2.0 * plain.value_N)


def test_entries_that_belong_to_the_value_are_clipped_and_dropped_and_others_refused():
    assert [is_sum_of_entries(one) for one in (DoubleEntries(), DoubleValue(), Own())] == [True, False, False]
    entry, drop = ClipSettings(kind="entry", limit=0.1), SupportSettings(side="teacher", k=3, rest="drop")
    tokens = aligned()
    expected = (2.0 * ForwardKL().entries(tokens)[0]).clamp(max=0.1).sum(dim=1)
    torch.testing.assert_close(apply_clip(DoubleEntries(), entry).value_and_gradient(tokens)[0], expected)
    dropped, plain = (
        restrict_support(one, drop).value_and_gradient(tokens)[0] for one in (DoubleEntries(), ForwardKL())
    )
    torch.testing.assert_close(dropped, 2.0 * plain)
    for own in (DoubleValue(), Own()):
        with pytest.raises(ConfigError, match=r"clip.kind=entry needs a divergence that is a sum"):
            apply_clip(own, entry)
        with pytest.raises(ConfigError, match=r"support.rest=drop needs a divergence that is a sum"):
            restrict_support(own, drop)


@pytest.mark.parametrize("own", [DoubleValue(), DoubleEntries()])
def test_the_neutral_clip_is_of_forward_kl_itself(own: Divergence):
    with pytest.raises(ConfigError, match="forward_kl only"):
        apply_clip(own, ClipSettings(kind="neutral", limit=0.1))


def test_what_looks_at_the_sampled_token_is_refused_before_a_model_is_loaded_where_that_may_be_left_out():
    renormalised, tail = (SupportSettings(side="teacher", k=3, rest=rest) for rest in ("renormalise", "tail"))
    with pytest.raises(ConfigError, match=r"divergence=own: support.rest=renormalise .*use support.rest=tail"):
        try_out(restrict_support(Own(), renormalised), name="own", support=renormalised)
    for support in (tail, FULL):
        try_out(restrict_support(Own(), support), name="own", support=support)
    clipped = apply_clip(ForwardKL(), ClipSettings(kind="neutral", limit=0.1))
    try_out(restrict_support(clipped, renormalised), name="forward_kl", support=renormalised)


def test_the_trial_comes_before_the_data_is_read():
    config = config_of("recipe=quickstart", "support=teacher_top100", "support.rest=renormalise")
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"divergence=own: support.rest=renormalise"):
        load_run_data(replace(config, divergence=Own()), [card_of(torch.device("cpu"))], told.append, train=True)
    assert told == []


def test_a_divergence_that_returns_something_else_is_refused_with_the_shapes():
    class Column(ForwardKL):
        def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
            value_n, gradient_nV = super().value_and_gradient(tokens)
            return value_n.unsqueeze(1), gradient_nV

    class Infinite(ForwardKL):
        def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
            value_n, gradient_nV = super().value_and_gradient(tokens)
            return value_n, gradient_nV / 0.0

    with pytest.raises(ConfigError, match=r"the value of 3 tokens over 14 entries has shape \[3, 1\].* be \[3\]"):
        try_out(Column(), name="column", support=FULL)
    with pytest.raises(ConfigError, match="the gradient of random distributions is not finite"):
        try_out(Infinite(), name="infinite", support=FULL)
