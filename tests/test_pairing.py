"""The alignment invariant: the same completion under every prompt, index by index."""

from __future__ import annotations

import torch
from gradient_ranks import WEIGH
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_cli.data.pairing import TokenBatch, filler_batch, pair
from opsd_cli.data.problems import Problem, PromptPair, Rollout

ids = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple)
PROBLEM = Problem("p", "q", "s", "1")


@st.composite
def rollouts(draw) -> list[Rollout]:
    with_other = draw(st.booleans())
    made = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = PromptPair(PROBLEM, draw(ids), draw(ids), draw(ids) if with_other else ())
        completion = draw(ids)
        logprobs = tuple(-float(i) for i in range(len(completion))) if draw(st.booleans()) else ()
        made.append(Rollout(prompt, completion, draw(st.sampled_from(["stop", "length"])), logprobs, 0))
    return made


def next_tokens(batch: TokenBatch) -> torch.Tensor:
    """What stands after each chosen position, by position and not by mask arithmetic."""
    found = []
    for row in range(len(batch.input_ids_BS)):
        for column in range(batch.input_ids_BS.shape[1]):
            if batch.predict_mask_BS[row, column]:
                found.append(int(batch.input_ids_BS[row, column + 1]))
    return torch.tensor(found)


@settings(max_examples=150, deadline=None)
@given(made=rollouts(), budget=st.integers(1, 120))
def test_every_role_predicts_the_same_tokens_in_the_same_order(made: list[Rollout], budget: int):
    batches = pair(made, max_tokens=budget, pad_id=0, weigh=WEIGH)
    assert sorted(id(r) for batch in batches for r in batch.rollouts) == sorted(map(id, made))
    for batch in batches:
        roles = [role for role in (batch.student, batch.teacher, batch.other) if role is not None]
        assert len(roles) == (3 if made[0].prompt.other_ids else 2)
        expected = torch.tensor([token for r in batch.rollouts for token in r.completion_ids])
        assert torch.equal(batch.target_ids_N, expected)
        for role in roles:
            assert torch.equal(next_tokens(role), expected)
        owner = [row for row, r in enumerate(batch.rollouts) for _ in r.completion_ids]
        assert batch.row_N.tolist() == owner
        for index, row in enumerate(owner):
            masked = batch.rollouts[row].finish_reason == "length"
            assert batch.weights_N[index] == (0.0 if masked else 1.0)
            assert torch.isnan(batch.sampler_logprobs_N[index]) == (not batch.rollouts[row].logprobs)
        widest = max(role.input_ids_BS.shape[1] for role in roles)
        assert len(batch.rollouts) == 1 or widest * len(batch.rollouts) <= budget


@settings(max_examples=50, deadline=None)
@given(made=rollouts())
def test_rows_hold_prompt_and_completion_and_then_only_padding(made: list[Rollout]):
    for batch in pair(made, max_tokens=10**6, pad_id=0, weigh=WEIGH):
        for row, rollout in enumerate(batch.rollouts):
            whole = [*rollout.prompt.teacher_ids, *rollout.completion_ids]
            assert batch.teacher.input_ids_BS[row, : len(whole)].tolist() == whole
            assert torch.all(batch.teacher.input_ids_BS[row, len(whole) :] == 0)


def test_empty_completions_are_left_out():
    empty = Rollout(PromptPair(PROBLEM, (1,), (2,)), (), "length", (), 0)
    assert pair([empty], max_tokens=10, pad_id=0, weigh=WEIGH) == []


def test_a_rollout_without_privileged_context_stands_under_the_students_prompt_without_weight():
    bare = Rollout(PromptPair(PROBLEM, (1, 2), ()), (3, 4), "stop", (), 0)
    (batch,) = pair([bare], max_tokens=10, pad_id=0, weigh=WEIGH)
    assert torch.equal(batch.teacher.input_ids_BS, batch.student.input_ids_BS)
    assert torch.all(batch.weights_N == 0)


def test_a_filler_batch_has_one_token_without_weight():
    filler = filler_batch(7)
    assert filler.weights_N.tolist() == [0.0]
    assert int(filler.student.predict_mask_BS.sum()) == len(filler.target_ids_N) == 1
