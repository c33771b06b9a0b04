"""Which completion tokens carry loss, and how much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import token_rules as rules

from opsd_cli.data.pairing import pair
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.loss.aligned import AlignedTokens, rowwise_dot
from opsd_cli.loss.token_factors import EntropyPrefix, Gate, Importance
from opsd_cli.loss.token_weights import RolloutWeights, ramp, weigh_rollouts
from opsd_cli.settings.config import LossSettings, TokenSettings

PROMPT = PromptPair(Problem("p", "q", "s", "1"), (5, 6), (7, 8, 9))


def rollout(*ids: int, finish: str = "stop", prompt: PromptPair = PROMPT, **more) -> Rollout:
    return Rollout(prompt, ids, finish, (), **more)


def weights(made: Rollout, settings: TokenSettings, **more) -> list[float]:
    plain = {"mask_truncated": True, "special_ids": frozenset({3})}
    return RolloutWeights(settings, **plain | more)(made)


def test_without_rules_every_token_counts_once():
    assert weights(rollout(4, 5, 6), rules()) == [1.0, 1.0, 1.0]


def test_the_first_tokens_are_skipped_even_of_a_shorter_completion():
    assert weights(rollout(4, 5, 6, 7), rules(skip_first=3)) == [0.0, 0.0, 0.0, 1.0]
    assert weights(rollout(4, 5), rules(skip_first=3)) == [0.0, 0.0]


def test_control_tokens_are_skipped_only_when_asked_for():
    assert weights(rollout(4, 3, 1), rules(skip_special=True)) == [1.0, 0.0, 1.0]
    assert weights(rollout(4, 3, 1), rules()) == [1.0, 1.0, 1.0]


def test_truncated_rollouts_and_those_without_context_carry_no_loss():
    assert weights(rollout(4, 5, finish="length"), rules()) == [0.0, 0.0]
    assert weights(rollout(4, 5, finish="length"), rules(), mask_truncated=False) == [1.0, 1.0]
    assert weights(rollout(4, 5, prompt=PromptPair(PROMPT.problem, (5,), ())), rules()) == [0.0, 0.0]


@pytest.mark.parametrize(("keep", "of_right", "of_wrong"), [("all", 1, 1), ("correct", 1, 0), ("wrong", 0, 1)])
def test_rollouts_can_be_kept_by_their_answer(keep: str, of_right: float, of_wrong: float):
    assert weights(rollout(4, correct=True), rules(keep=keep)) == [of_right]
    assert weights(rollout(5), rules(keep=keep)) == [of_wrong]


@given(count=st.integers(1, 200), slope=st.floats(0, 1))
def test_a_ramp_rises_and_has_mean_one(count: int, slope: float):
    values = ramp(count, slope)
    assert values == sorted(values)
    assert sum(values) / count == pytest.approx(1.0)
    assert min(values) >= 0


def tokens() -> AlignedTokens:
    student = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]).log_softmax(-1)
    teacher = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).log_softmax(-1)
    return AlignedTokens(student, teacher, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("gate", "passed"),
    [("student_entropy", [1.0, 0.0]), ("teacher_entropy", [0.0, 1.0]), ("privilege", [1.0, 0.0])],
)
def test_gates_look_at_both_distributions(gate: str, passed: list[float]):
    assert Gate(rules(gate=gate, gate_min=0.5))(tokens(), slice(0, 2)).tolist() == passed


@pytest.mark.parametrize("gate", ["student_entropy", "teacher_entropy", "privilege"])
def test_a_token_exactly_at_the_bound_of_a_gate_does_not_pass(gate: str):
    one = tokens()
    measured = {
        "student_entropy": -rowwise_dot(one.student_probs_nV, one.student_logprobs_nV),
        "teacher_entropy": -rowwise_dot(one.teacher_probs_nV, one.teacher_logprobs_nV),
        "privilege": one.at_target(one.log_ratio_nV),
    }
    bound = measured[gate].max().item()
    assert sum(Gate(rules(gate=gate, gate_min=bound))(one, slice(0, 2)).tolist()) == 0
    assert sum(Gate(rules(gate=gate, gate_min=bound - 1e-4))(one, slice(0, 2)).tolist()) == 1


def test_importance_is_the_capped_ratio_and_one_for_completions_nobody_drew():
    sampler = torch.tensor([torch.tensor(1 / 6).log(), torch.nan])
    assert Importance(sampler, cap=5.0)(tokens(), slice(0, 2)).tolist() == pytest.approx([2.0, 1.0])
    assert Importance(sampler, cap=1.5)(tokens(), slice(0, 2)).tolist() == pytest.approx([1.5, 1.0])


def test_a_prefix_ends_where_it_is_told_or_only_in_wrong_rollouts():
    assert weights(rollout(4, 5, 6), rules(first=2)) == [1.0, 1.0, 0.0]
    assert weights(rollout(4, 5), rules(first=5)) == [1.0, 1.0]
    assert weights(rollout(4, 5, 6), rules(first=2, skip_first=1)) == [0.0, 1.0, 0.0]
    of_wrong = rules(first=1, prefix_of="wrong")
    assert weights(rollout(4, 5, correct=True), of_wrong) == [1.0, 1.0]
    assert weights(rollout(4, 5), of_wrong) == [1.0, 0.0]


SHORT, LONG, OTHER = rollout(4, correct=True), rollout(4, 5, 6, number=1), rollout(4, 5, place=7)


def step_weights(reduction: str = "token", *made: Rollout, **changes) -> list[list[float]]:
    loss = LossSettings(
        temperature=1.0, mask_truncated=True, importance_cap=None, chunk_mib=None, reduction=reduction,
        logits_dtype="auto",
    )  # fmt: skip
    weighed = weigh_rollouts(made or (SHORT, LONG, OTHER), tokens=rules(**changes), loss=loss, special_ids=())
    return [list(one) for _, one in weighed]


def test_a_reduction_makes_tokens_completions_or_problems_weigh_alike():
    assert step_weights("token") == [[1.0], [1.0, 1.0, 1.0], [1.0, 1.0]]
    for made in step_weights("sequence"), step_weights("sequence", ramp=0.5):
        assert [sum(one) for one in made] == pytest.approx([1.0, 1.0, 1.0])
    made = step_weights("problem")
    assert made[0] == [0.25]
    assert [sum(made[0]) + sum(made[1]), sum(made[2])] == pytest.approx([1.0, 1.0])


def test_what_carries_no_loss_adds_nothing_to_a_mean():
    cut = rollout(4, 5, finish="length", place=3)
    assert step_weights("sequence", cut, LONG)[0] == [0.0, 0.0]
    assert step_weights("problem", cut, OTHER) == [[0.0, 0.0], [0.5, 0.5]]


def test_a_problem_weighs_by_the_share_of_its_right_rollouts():
    family = [rollout(4, correct=number < 1, number=number) for number in range(4)]
    assert step_weights("token", *family, pass_powers=(0.5, 0.5))[3] == [pytest.approx((0.25 * 0.75) ** 0.5)]
    assert step_weights("token", *family, pass_powers=(0.0, 2.0))[0] == [pytest.approx(0.75**2)]
    assert step_weights("problem", *family, OTHER, pass_powers=(0.0, 1.0))[4] == [0.5, 0.5]
    solved = [rollout(4, correct=True, number=number) for number in range(2)]
    assert step_weights("token", *solved, pass_powers=(1.0, 1.0)) == [[0.0], [0.0]]


@settings(deadline=None)
@given(low=st.floats(-1, 1), high=st.floats(-1, 1), width=st.floats(0.01, 5), bound=st.floats(-1, 2))
def test_a_graded_gate_lies_between_its_two_factors_and_a_narrow_one_is_a_step(low, high, width, bound):
    gate = rules(gate="entropy_gap", gate_min=bound, gate_low=low, gate_high=high, gate_width=width)
    factors = Gate(gate)(tokens(), slice(0, 2))
    assert torch.all((factors >= min(low, high) - 1e-6) & (factors <= max(low, high) + 1e-6))
    gap = tokens().student_entropy_n - tokens().teacher_entropy_n
    expected = low + (high - low) / (1 + torch.exp(-(gap - bound) / width))
    torch.testing.assert_close(factors, expected, rtol=1e-4, atol=1e-5)
    step, narrow = (Gate(rules(**{**vars(gate), "gate_width": w}))(tokens(), slice(0, 2)) for w in (0.0, 1e-7))
    if (gap - bound).abs().min() > 1e-4:
        torch.testing.assert_close(step, narrow)


def test_a_gate_by_the_answer_pulls_in_right_completions_and_pushes_in_wrong_ones():
    one = replace(tokens(), right_n=torch.tensor([True, False]))
    gate = Gate(rules(gate="right_answer", gate_min=0.5, gate_low=-0.5))
    assert gate(one, slice(0, 2)).tolist() == [1.0, -0.5]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), size=st.integers(1, 12), nats=st.floats(0.1, 8))
def test_an_entropy_prefix_is_the_same_in_blocks_of_any_size(seed: int, size: int, nats: float):
    generator = torch.Generator().manual_seed(seed)
    lengths = [4, 1, 6]
    teacher = torch.randn(sum(lengths), 5, generator=generator).log_softmax(-1)
    made = [rollout(*range(4, 4 + n), number=i, correct=i == 0) for i, n in enumerate(lengths)]
    (batch,) = pair([[(one, [1.0] * len(one.completion_ids)) for one in made]])
    for of in ("all", "wrong"):
        prefix = EntropyPrefix.of(batch, rules(prefix_nats=nats, prefix_of=of))
        factors = []
        for start in range(0, len(teacher), size):
            rows = slice(start, min(start + size, len(teacher)))
            factors += prefix(AlignedTokens(teacher[rows], teacher[rows], None), rows).tolist()
        expected = []
        for number, entropies in enumerate(
            AlignedTokens(teacher, teacher, None).teacher_entropy_n.double().split(lengths)
        ):
            spent = [0.0, *entropies.cumsum(0).tolist()[:-1]]
            expected += [float(before < nats or (of == "wrong" and number == 0)) for before in spent]
        assert factors == expected
