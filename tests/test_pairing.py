"""The alignment invariant: the same completion under every prompt, index by index."""

from __future__ import annotations

import torch
from gradient_ranks import WEIGH
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_cli.data.microbatches import plan_microbatches
from opsd_cli.data.pairing import TokenBatch, Weighed, filler_batch, pair, row_length
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
        made.append(Rollout(prompt, completion, draw(st.sampled_from(["stop", "length"])), logprobs))
    return made


def weighed(made: list[Rollout]) -> list[Weighed]:
    return [(rollout, WEIGH(rollout)) for rollout in made]


def next_tokens(batch: TokenBatch) -> torch.Tensor:
    """What stands after each place that predicts."""
    ids = batch.input_ids_L.tolist()
    return torch.tensor([ids[place + 1] for place in batch.predict_N.tolist()])


@settings(max_examples=150, deadline=None)
@given(made=rollouts())
def test_every_role_predicts_the_same_tokens_in_the_same_order(made: list[Rollout]):
    (batch,) = pair([weighed(made)])
    roles = [role for role in (batch.student, batch.teacher, batch.other) if role is not None]
    assert len(roles) == (3 if made[0].prompt.other_ids else 2)
    expected = torch.tensor([token for r in batch.rollouts for token in r.completion_ids])
    assert torch.equal(batch.target_ids_N, expected)
    for role in roles:
        assert torch.equal(next_tokens(role), expected)
    owner = [row for row, r in enumerate(batch.rollouts) for _ in r.completion_ids]
    assert batch.weight == float(batch.weights_N.sum())
    for index, row in enumerate(owner):
        masked = batch.rollouts[row].finish_reason == "length"
        assert batch.weights_N[index] == (0.0 if masked else 1.0)
        assert torch.isnan(batch.sampler_logprobs_N[index]) == (not batch.rollouts[row].logprobs)


@settings(max_examples=50, deadline=None)
@given(made=rollouts())
def test_rows_hold_prompt_and_completion_and_nothing_else(made: list[Rollout]):
    (batch,) = pair([weighed(made)])
    rows = [[*rollout.prompt.teacher_ids, *rollout.completion_ids] for rollout in made]
    assert [row.tolist() for row in batch.teacher.input_ids_L.split(list(batch.teacher.lengths))] == rows


@settings(max_examples=150, deadline=None)
@given(made=rollouts(), budget=st.integers(1, 120), ranks=st.integers(1, 3), padded=st.booleans())
def test_the_rollouts_of_all_ranks_are_shared_out_once(made: list[Rollout], budget: int, ranks: int, padded: bool):
    drawn = [weighed(made[rank::ranks]) for rank in range(ranks)]
    shares = [plan_microbatches(drawn, rank=rank, max_tokens=budget, padded=padded) for rank in range(ranks)]
    given_out = [id(rollout) for share in shares for batch in share for rollout, _ in batch]
    assert sorted(given_out) == sorted(id(r) for r in made if any(WEIGH(r)))
    for batch in (batch for share in shares for batch in share):
        lengths = [row_length(rollout) for rollout, _ in batch]
        assert len(batch) == 1 or (len(batch) * max(lengths) if padded else sum(lengths)) <= budget


def test_ranks_get_equal_work_whoever_drew_it():
    def made(length: int) -> Rollout:
        return Rollout(PromptPair(PROBLEM, (1,), (2,)), (3,) * length, "stop", ())

    short, long = [made(10) for _ in range(40)], [made(100) for _ in range(40)]
    shares = [
        plan_microbatches([weighed(short), weighed(long)], rank=rank, max_tokens=1000, padded=False) for rank in (0, 1)
    ]
    tokens = [sum(row_length(rollout) for batch in share for rollout, _ in batch) for share in shares]
    assert abs(tokens[0] - tokens[1]) < 0.1 * sum(tokens)
    assert len(shares[0]) == len(shares[1])


def test_a_rollout_without_privileged_context_has_no_weight_and_is_not_scored():
    bare = Rollout(PromptPair(PROBLEM, (1, 2), ()), (3, 4), "stop", ())
    assert plan_microbatches([weighed([bare])], rank=0, max_tokens=10, padded=False) == []


def test_a_filler_batch_has_one_token_without_weight():
    filler = filler_batch(7)
    assert filler.weights_N.tolist() == [0.0]
    assert len(filler.student.predict_N) == len(filler.target_ids_N) == 1
