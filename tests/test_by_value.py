"""A divergence written as its value: the gradient that autograd makes of it, in the loss's own blocks, and the check of
every closed form against it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from divergence_table import DIVERGENCES
from test_loss import Case, V
from torch import Tensor

from opsd_cli.loss import chunk_rows
from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.by_value import check_closed_form, differentiated, has_own_value, value_and_gradient
from opsd_cli.loss.chunk_rows import LossInputs
from opsd_cli.loss.chunked_head import try_out
from opsd_cli.loss.clip import apply_clip
from opsd_cli.loss.divergences import AtSampledToken, ByValue, EntriesByValue, ForwardKL, ReverseKL, is_sum_of_entries
from opsd_cli.loss.routed import Routed
from opsd_cli.loss.support import restrict_support
from opsd_cli.loss.types import TokenScores
from opsd_cli.settings.config import ClipSettings, SupportSettings
from opsd_cli.settings.errors import ConfigError

CLIPS = [ClipSettings(kind=kind, limit=0.2) for kind in ("none", "entry", "neutral", "token")]
SUPPORTS = [SupportSettings(side="full", k=3, rest="tail")] + [
    SupportSettings(side=side, k=3, rest=rest)
    for side, rest in product(("teacher", "student", "union"), ("tail", "renormalise", "drop"))
]


@dataclass(frozen=True)
class WrittenForwardKL(ByValue):
    """Nothing but the formula."""

    def value(self, tokens: AlignedTokens) -> Tensor:
        ratio_nV = tokens.teacher_logprobs_nV - tokens.student_logprobs_nV
        return (tokens.teacher_probs_nV * ratio_nV).sum(dim=1)


@dataclass(frozen=True)
class WrittenReverseKL(EntriesByValue):
    def entry_values(self, tokens: AlignedTokens) -> Tensor:
        return tokens.student_probs_nV * (tokens.student_logprobs_nV - tokens.teacher_logprobs_nV)


ROUTED = Routed(by="right_answer", above="forward_kl", below="reverse_kl", bound=0.5)
WRITTEN = [(WrittenForwardKL(), ForwardKL()), (WrittenReverseKL(), ReverseKL())]


def every_form() -> list:
    """Every registered divergence under every clip and support that it can have."""
    made = []
    for divergence, clip, support in product([*DIVERGENCES.values(), ROUTED], CLIPS, SUPPORTS):
        if isinstance(divergence, AtSampledToken) and (clip.kind != "none" or support.side != "full"):
            continue
        try:
            made.append(restrict_support(apply_clip(divergence, clip), support))
        except ConfigError:
            continue
    return made


def tokens(dtype: torch.dtype = torch.float64, seed: int = 0) -> AlignedTokens:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2.0 * torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    right = torch.tensor([True, False, True, False, True])
    return AlignedTokens(
        student.log_softmax(1).to(dtype), teacher.log_softmax(1).to(dtype), torch.arange(5), right_n=right
    )


def test_every_closed_form_under_every_clip_and_support_is_that_of_its_value():
    forms = every_form()
    assert len(forms) > 200
    for form in forms:
        assert has_own_value(form), form
        assert check_closed_form(form) < 1e-9, form
        single = value_and_gradient(form.value, tokens(torch.float32))
        for got, right in zip(form.value_and_gradient(tokens(torch.float32)), single, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("written", "built_in"), WRITTEN)
def test_a_value_alone_does_all_that_a_closed_form_does(written: ByValue, built_in):
    ways = [
        (clip, support)
        for clip, support in product(CLIPS, SUPPORTS)
        if clip.kind != "neutral"
        and (clip.kind, support.rest) != ("token", "drop")
        and (isinstance(written, EntriesByValue) or (clip.kind != "entry" and support.rest != "drop"))
    ]
    for clip, support in ways:
        one, other = (restrict_support(apply_clip(base, clip), support) for base in (written, built_in))
        for got, right in zip(one.value_and_gradient(tokens()), other.value_and_gradient(tokens()), strict=True):
            torch.testing.assert_close(got, right)
    assert is_sum_of_entries(written) is isinstance(written, EntriesByValue)


@pytest.mark.parametrize(("written", "built_in"), WRITTEN)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_loss_of_a_written_value_is_that_of_the_closed_form(
    written, built_in, rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunk_rows, "CACHE_BYTES", 4 * V * rows)
    pairs = []
    for divergence in (written, built_in):
        case = Case(softcap=2.0)
        loss = case.loss(divergence, rows=8)
        pairs.append([loss.value_N, *torch.autograd.grad(loss.weighted_sum, case.leaves())])
    for got, right in zip(*pairs, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-9)


def test_what_autograd_keeps_is_of_one_block(monkeypatch: pytest.MonkeyPatch):
    """The loss of 11 tokens in blocks of one row keeps a row at a time, and nothing once a block is done."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    monkeypatch.setattr(chunk_rows, "CACHE_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Case().loss(WrittenForwardKL(), rows=22)
    assert kept
    assert max(kept) <= V


def test_blocks_on_a_gpu_are_half_as_long_where_autograd_keeps_their_tensors():
    case, raw = Case(), torch.empty(2, 8, V, device="meta")
    token, top = ClipSettings(kind="token", limit=0.1), SUPPORTS[1]

    def rows(divergence) -> int:
        scores = TokenScores(case.teacher, None)
        inputs = LossInputs(case.head, scores, case.targets, case.weights, divergence, 1.0, 4 * V * 8 * 64)
        return chunk_rows.block_rows(inputs, raw)

    for written, built_in in WRITTEN:
        assert rows(built_in) == 64
        assert rows(written) == rows(restrict_support(apply_clip(written, token), top)) == 32


def test_a_subclass_gets_the_gradient_of_what_it_redefines():
    class Twice(ForwardKL):
        def value(self, tokens: AlignedTokens) -> Tensor:
            return 2.0 * super().value(tokens)

    value_n, gradient_nV = ForwardKL().value_and_gradient(tokens())
    twice_n, twice_nV = Twice().value_and_gradient(tokens())
    torch.testing.assert_close(twice_n, 2.0 * value_n)
    torch.testing.assert_close(twice_nV, 2.0 * gradient_nV)
    assert not is_sum_of_entries(Twice())


class WrongForm(WrittenForwardKL):
    """A closed form with a sign error."""

    def value(self, tokens: AlignedTokens) -> Tensor:
        return super().value(tokens)

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        return self.value(tokens), tokens.teacher_probs_nV - tokens.student_probs_nV


class NoStudent(ByValue):
    def value(self, tokens: AlignedTokens) -> Tensor:
        return tokens.teacher_entropy_n


def test_a_wrong_closed_form_and_a_value_without_the_student_are_refused_before_a_model_is_loaded():
    full = SUPPORTS[0]
    with pytest.raises(ConfigError, match=r"divergence=wrong: the closed form's gradient is not that of `value`"):
        try_out(WrongForm(), name="wrong", support=full)
    with pytest.raises(ConfigError, match="divergence=constant: its value does not depend on the student"):
        try_out(NoStudent(), name="constant", support=full)
    token = apply_clip(WrongForm(), ClipSettings(kind="token", limit=0.1))
    with pytest.raises(ConfigError, match="not that of `value`"):
        check_closed_form(token)


def test_a_closed_form_without_a_value_of_its_own_is_taken_as_it_is():
    class Doubled(ForwardKL):
        def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
            value_n, gradient_nV = super().value_and_gradient(tokens)
            return 2.0 * value_n, 2.0 * gradient_nV

    assert not has_own_value(Doubled())
    assert check_closed_form(Doubled()) == 0.0


def test_the_teacher_gets_no_gradient_and_the_students_numbers_are_left_alone():
    one = tokens()
    one.student_probs_nV  # noqa: B018 - a value computed before must not be the one that is differentiated
    differentiated(ForwardKL().value, one)
    assert not one.student_logprobs_nV.requires_grad
    assert not one.teacher_logprobs_nV.requires_grad
