"""Which completion tokens carry loss, and how much."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.loss.divergences import AlignedTokens, rowwise_dot
from opsd_cli.loss.token_weights import Gate, Importance, RolloutWeights, ramp
from opsd_cli.settings.config import TokenSettings

PROMPT = PromptPair(Problem("p", "q", "s", "1"), (5, 6), (7, 8, 9))


def rules(**changes) -> TokenSettings:
    plain = {"skip_first": 0, "ramp": 0.0, "skip_special": False, "keep": "all", "gate": "none", "gate_min": 0.0}
    return TokenSettings(**plain | changes)


def rollout(*ids: int, finish: str = "stop", prompt: PromptPair = PROMPT, number: int = 0) -> Rollout:
    return Rollout(prompt, ids, finish, (), number=number)


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
    right, wrong = rollout(4), rollout(5, number=1)
    correct = frozenset({right.key})
    assert weights(right, rules(keep=keep), correct=correct) == [of_right]
    assert weights(wrong, rules(keep=keep), correct=correct) == [of_wrong]


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
