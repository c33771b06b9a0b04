"""The chunked head against logits written out and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsd_cli.loss import chunk_rows
from opsd_cli.loss.chunk_rows import LossInputs
from opsd_cli.loss.chunked_head import distill
from opsd_cli.loss.divergences import CrossEntropy, ForwardKL, GeneralizedJSD, ReverseKL
from opsd_cli.loss.types import Head, TokenLoss, TokenMixture, TokenScores

N, D, V = 11, 6, 17
FORMULAS = {
    "forward_kl": (ForwardKL(), lambda s, t: (t.exp() * (t - s)).sum(-1)),
    "reverse_kl": (ReverseKL(), lambda s, t: (s.exp() * (s - t)).sum(-1)),
}


class Case:
    """Two roles' hidden states, a head, targets and weights."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.double, bias: bool = True, **transforms) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.double).to(dtype)

        self.student, self.teacher = draw(N, D).requires_grad_(), draw(N, D)
        self.head = Head(draw(V, D).requires_grad_(), draw(V).requires_grad_() if bias else None, **transforms)
        self.targets = torch.randint(0, V, (N,), generator=generator)
        self.weights = torch.rand(N, generator=generator)
        self.weights[3] = 0.0

    def loss(self, divergence, *, rows: int = 4, teacher="same", temperature: float = 1.3, **more) -> TokenLoss:
        scores = TokenScores(self.teacher, None) if teacher == "same" else teacher
        inputs = LossInputs(
            self.head, scores, self.targets, self.weights, divergence, temperature, 4 * V * rows, **more
        )
        return distill(self.student, inputs)

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.student, self.head.weight_VD, self.head.bias_V) if leaf is not None]

    def plain(self, formula, *, temperature: float = 1.3) -> Tensor:
        student = (self.head.logits(self.student) / temperature).log_softmax(-1)
        with torch.no_grad():
            teacher = (self.head.logits(self.teacher) / temperature).log_softmax(-1)
        return (formula(student, teacher) * self.weights).sum()


@pytest.mark.parametrize("transforms", [{}, {"scale": 0.7}, {"softcap": 2.0}, {"scale": 1.5, "softcap": 3.0}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradients_equal_autograd_on_whole_logits(name: str, bias: bool, transforms: dict):
    divergence, formula = FORMULAS[name]
    case = Case(bias=bias, **transforms)
    expected = case.plain(formula)
    expected_gradients = torch.autograd.grad(expected, case.leaves())
    loss = case.loss(divergence)
    gradients = torch.autograd.grad(3.0 * loss.weighted_sum, case.leaves())
    torch.testing.assert_close(loss.weighted_sum, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, 3.0 * wanted, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), seed=st.integers(0, 1000))
def test_the_chunk_size_changes_nothing(rows: int, seed: int):
    case = Case(seed=seed)
    one, other = (
        case.loss(GeneralizedJSD(beta=0.4, normalize=False), rows=1),
        case.loss(GeneralizedJSD(beta=0.4, normalize=False), rows=rows),
    )
    torch.testing.assert_close(one.value_N, other.value_N)
    for name, value in one.diagnostics.items():
        torch.testing.assert_close(value, other.diagnostics[name])
    for a, b in zip(
        torch.autograd.grad(one.weighted_sum, case.leaves()),
        torch.autograd.grad(other.weighted_sum, case.leaves()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_the_block_size_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch):
    whole = Case().loss(ReverseKL(), rows=1000)
    monkeypatch.setattr(chunk_rows, "CACHE_BYTES", 4 * V * rows)
    case = Case()
    parts = case.loss(ReverseKL(), rows=14)  # both roles of 7 tokens
    torch.testing.assert_close(whole.value_N, parts.value_N)
    for name, value in whole.diagnostics.items():
        torch.testing.assert_close(value, parts.diagnostics[name])
    whole_case = Case()
    expected = torch.autograd.grad(whole_case.loss(ReverseKL(), rows=1000).weighted_sum, whole_case.leaves())
    for got, wanted in zip(torch.autograd.grad(parts.weighted_sum, case.leaves()), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_a_frozen_head_gets_no_gradient_and_the_teacher_never_does():
    case = Case()
    head = Head(case.head.weight_VD.detach(), None)
    case.head, case.teacher = head, case.teacher.requires_grad_()
    case.loss(ForwardKL()).weighted_sum.backward()
    assert case.student.grad is not None
    assert case.teacher.grad is None
    assert head.weight_VD.grad is None


def test_a_weight_of_zero_takes_a_token_out():
    case = Case()
    case.loss(ForwardKL()).weighted_sum.backward()
    assert torch.all(case.student.grad[3] == 0)
    assert torch.any(case.student.grad[2] != 0)


def test_a_second_backward_fails_rather_than_being_wrong():
    loss = Case().loss(ForwardKL()).weighted_sum
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


def test_a_teachers_own_head_is_used_for_its_logits():
    case = Case()
    own = Head(torch.randn(V, D, dtype=torch.double), None)
    loss = case.loss(ForwardKL(), teacher=TokenScores(case.teacher, own))
    student = (case.head.logits(case.student) / 1.3).log_softmax(-1)
    teacher = (own.logits(case.teacher) / 1.3).log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1)
    torch.testing.assert_close(loss.value_N, expected.detach().float(), rtol=1e-5, atol=1e-5)


def test_without_a_teacher_only_the_student_is_described():
    case = Case()
    loss = case.loss(CrossEntropy(), teacher=None, temperature=1.0)
    expected = torch.nn.functional.cross_entropy(case.head.logits(case.student), case.targets, reduction="none")
    torch.testing.assert_close(loss.value_N, expected.detach().float(), rtol=1e-5, atol=1e-5)
    assert loss.diagnostics.keys() == {"logprob/student", "entropy/student"}
    torch.testing.assert_close(loss.diagnostics["logprob/student"], -expected.detach().float(), rtol=1e-5, atol=1e-5)


def test_the_diagnostics_are_exact_whatever_is_optimised():
    case = Case()
    student, teacher = ((case.head.logits(h) / 1.3).log_softmax(-1).detach() for h in (case.student, case.teacher))
    expected = {
        "logprob/student": student.gather(1, case.targets.unsqueeze(1)).squeeze(1),
        "kl/forward": (teacher.exp() * (teacher - student)).sum(-1),
        "kl/reverse": (student.exp() * (student - teacher)).sum(-1),
        "entropy/student": -(student.exp() * student).sum(-1),
        "entropy/teacher": -(teacher.exp() * teacher).sum(-1),
        "agree/top1": (student.argmax(-1) == teacher.argmax(-1)).double(),
    }
    for divergence in (ForwardKL(), ReverseKL(), GeneralizedJSD(beta=0.5, normalize=False)):
        found = case.loss(divergence).diagnostics
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.float(), rtol=1e-4, atol=1e-5)


def test_the_same_hidden_states_give_zero_loss_and_zero_gradient():
    case = Case()
    same = TokenScores(case.student.detach(), None)
    for divergence in (ForwardKL(), ReverseKL(), GeneralizedJSD(beta=0.5, normalize=True)):
        loss = case.loss(divergence, teacher=same)
        torch.testing.assert_close(loss.value_N, torch.zeros(N), atol=1e-12, rtol=0)
        for gradient in torch.autograd.grad(loss.weighted_sum, case.leaves()):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_a_mixture_is_the_normalised_weighted_sum_of_log_probabilities():
    case = Case()
    other = TokenScores(torch.randn(N, D, dtype=torch.double), None)
    mixture = TokenMixture(((1.5, TokenScores(case.teacher, None)), (-0.5, other)), student_weight=0.25)
    loss = case.loss(ForwardKL(), teacher=mixture)
    logs = [(case.head.logits(h) / 1.3).log_softmax(-1).detach() for h in (case.student, case.teacher, other.hidden_ND)]
    target = (0.25 * logs[0] + 1.5 * logs[1] - 0.5 * logs[2]).log_softmax(-1)
    expected = (target.exp() * (target - logs[0])).sum(-1)
    torch.testing.assert_close(loss.value_N, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_mean_of_probabilities_is_that_also_where_an_entry_underflows():
    case = Case()
    other = TokenScores(torch.randn(N, D, dtype=torch.double), None)
    mixture = TokenMixture(((0.75, TokenScores(case.teacher, None)), (0.25, other)), in_probabilities=True)
    loss = case.loss(ForwardKL(), teacher=mixture)
    logs = [(case.head.logits(h) / 1.3).log_softmax(-1).detach() for h in (case.student, case.teacher, other.hidden_ND)]
    target = 0.75 * logs[1].exp() + 0.25 * logs[2].exp()
    torch.testing.assert_close(loss.value_N, (target * (target.log() - logs[0])).sum(-1).float(), rtol=1e-4, atol=1e-5)
    far = torch.tensor([[0.0, -200.0, -300.0]])
    mean, _ = chunk_rows.mix(mixture, far, [far, far])
    torch.testing.assert_close(mean, far)


class HalfCase:
    """bfloat16 hidden states and head with logits up to about 30, as models make them, and the same numbers in fp64."""

    def __init__(self, vocabulary: int = 500, size: int = 64) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = (torch.randn(vocabulary, size, generator=generator) / 2).bfloat16()
        self.student = (torch.randn(40, size, generator=generator) * 2).bfloat16()
        self.teacher = (self.student + torch.randn(40, size, generator=generator) / 20).bfloat16()
        self.weights, self.targets = torch.rand(40, generator=generator), torch.arange(40)

    def loss(self, divergence, dtype: torch.dtype, *, scale: float = 1.0, **more) -> tuple[Tensor, Tensor, Tensor]:
        """Value at each token, and the gradients of `scale` times the loss: of the hidden states and of the head."""
        student, weight = (t.to(dtype, copy=True).requires_grad_() for t in (self.student, self.weight))
        teacher = TokenScores(self.teacher.to(dtype), None)
        made = distill(
            student,
            LossInputs(Head(weight, None), teacher, self.targets, self.weights, divergence, 1.0, 2**16, **more),
        )
        (made.weighted_sum * scale).backward()
        return made.value_N.double(), student.grad, weight.grad


def apart(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(beta=0.3, normalize=True)])
def test_logits_in_fp32_take_the_rounding_out_of_a_bfloat16_loss(divergence):
    case = HalfCase()
    right, hidden, weight = case.loss(divergence, torch.double)
    half, half_hidden, _ = case.loss(divergence, torch.bfloat16)
    wide, wide_hidden, wide_weight = case.loss(divergence, torch.bfloat16, wide_logits=True)
    assert wide_hidden.dtype == wide_weight.dtype == torch.bfloat16
    assert apart(wide, right) < 1e-3 < 1e-2 < apart(half, right)
    # What is left in the gradients is their own rounding to eight bits.
    assert max(apart(wide_hidden, hidden), apart(wide_weight, weight)) < 4e-3
    assert apart(wide_hidden, hidden) < 0.3 * apart(half_hidden, hidden)


def test_logits_in_fp32_change_nothing_in_fp32():
    case = Case(dtype=torch.float32)
    torch.testing.assert_close(
        case.loss(ForwardKL(), wide_logits=True).value_N, case.loss(ForwardKL()).value_N, rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_of_the_loss_is_not_rounded_to_half_precision(dtype: torch.dtype):
    """Rounded to eight bits this scale, and with it every gradient, would be 0.34 % off."""
    case = HalfCase()
    _, *whole = case.loss(ForwardKL(), dtype)
    _, *scaled = case.loss(ForwardKL(), dtype, scale=1.0044)
    for a, b in zip(whole, scaled, strict=True):
        ratio = float((a.double() * b.double()).sum() / a.double().square().sum())
        assert ratio == pytest.approx(1.0044, abs=1.5e-3)


class Double:
    """A factor of two for every token."""

    name = "tokens/importance"

    def __call__(self, tokens, chunk: slice) -> Tensor:
        return torch.full_like(tokens.forward_kl_n, 2.0)


def test_factors_scale_value_and_gradient_alike():
    case = Case()
    once, twice = case.loss(ForwardKL()), case.loss(ForwardKL(), factors=(Double(),))
    torch.testing.assert_close(twice.weighted_sum, 2 * once.weighted_sum)
    (a,), (b,) = (torch.autograd.grad(loss.weighted_sum, [case.student]) for loss in (once, twice))
    torch.testing.assert_close(b, 2 * a)
    assert torch.all(twice.diagnostics["tokens/importance"] == 2)
