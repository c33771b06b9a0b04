"""What ranks tell each other of a step: the plan is that of old, and only what must move does."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import TESTS, run_ranks

from opsd_cli.data.microbatches import outlines_of, owners_of, plan_rows
from opsd_cli.data.pairing import Weighed, row_length, shared_length
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.data.shared_rows import SharedRows
from opsd_cli.testing.pretended_ranks import on_ranks
from opsd_cli.training.step_report import chosen_keys, collect_samples

ids = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple)
floats = st.floats(-9, 0, width=32)
SHARED = settings(max_examples=60, deadline=None)


@st.composite
def steps(draw) -> tuple[list[PromptPair], list[list[Weighed]]]:
    """The prompts of a step, and what each rank drew: the problems dealt out, each with its rollouts."""
    ranks, problems, group = draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    prompts = [PromptPair(Problem(str(i), "q", "s", "1"), draw(ids), draw(ids), draw(ids)) for i in range(problems)]
    drawn: list[list[Weighed]] = [[] for _ in range(ranks)]
    for place, number in itertools.product(range(problems), range(group)):
        # Where rollouts are shown to the teacher, prompts are rebuilt, and may be empty.
        prompt = draw(st.sampled_from([prompts[place], replace(prompts[place], teacher_ids=draw(ids | st.just(())))]))
        completion = draw(ids)
        logprobs = tuple(draw(floats) for _ in completion) if draw(st.booleans()) else ()
        rollout = Rollout(
            prompt, completion, draw(st.sampled_from(["stop", "length"])), logprobs, place, number,
            draw(st.booleans()), draw(st.none() | st.integers(0, 1)),
        )  # fmt: skip
        weight = draw(st.sampled_from([0.0, 1.0, 0.5])) if prompt.teacher_ids else 0.0
        drawn[place % ranks].append((rollout, [weight] * len(completion)))
    return prompts, drawn


def old_pieces(drawn: Sequence[Sequence[Weighed]], *, max_tokens: int, padded: bool, shares: bool) -> list[list]:
    """The micro-batches as they were when every rank had every rollout: the plan in plain words."""
    rows = [one for of_rank in drawn for one in of_rank if any(one[1])]
    units = [[one] for one in rows]
    if shares:
        units = []
        for _, group in groupby(rows, key=lambda one: one[0].place):
            units.append([])
            for one in sorted(group, key=lambda one: row_length(one[0])):
                if units[-1] and shared_length([r for r, _ in [*units[-1], one]]) > max_tokens:
                    units.append([])
                units[-1].append(one)
    units.sort(key=lambda unit: shared_length([r for r, _ in unit]))
    lengths = [shared_length([r for r, _ in unit]) for unit in units]
    rounds = max(1, -(-sum(lengths) // (len(drawn) * max_tokens)))
    while True:
        count = rounds * len(drawn)
        middles = [after - length / 2 for after, length in zip(accumulate(lengths), lengths, strict=True)]
        owners = [min(count - 1, int(middle * count / sum(lengths))) for middle in middles]
        pieces = [[unit for unit, owner in zip(units, owners, strict=True) if owner == piece] for piece in range(count)]
        sizes = [[shared_length([r for r, _ in unit]) for unit in piece] for piece in pieces]
        if all(len(s) <= 1 or (len(s) * max(s) if padded else sum(s)) <= max_tokens for s in sizes):
            return [[one for unit in piece for one in unit] for piece in pieces if piece] if rows else []
        rounds += 1


def dealt(step, **how) -> list[list[list[Weighed]]]:
    """Each rank's micro-batches, over pretended ranks."""
    prompts, drawn = step
    return on_ranks(len(drawn), lambda ranks: SharedRows(drawn[ranks.rank], ranks, prompts.__getitem__).dealt(**how))[0]


@SHARED
@given(step=steps(), budget=st.integers(1, 120), padded=st.booleans(), shares=st.booleans())
def test_micro_batches_are_those_of_ranks_that_know_everything(step, budget: int, padded: bool, shares: bool):
    how = {"max_tokens": budget, "padded": padded, "shares": shares}
    found = dealt(step, **how)
    batches = [batch for of_rank in found for batch in of_rank if batch]
    wanted = old_pieces(step[1], **how)
    assert sorted(batches, key=repr) == sorted(wanted, key=repr), "rows, their order and their values"
    keys = Counter(rollout.key for batch in batches for rollout, _ in batch)
    assert keys == Counter(rollout.key for of_rank in step[1] for rollout, weights in of_rank if any(weights))
    assert len({len(of_rank) for of_rank in found}) == 1, "as many passes on every rank"


@SHARED
@given(step=steps(), budget=st.integers(20, 120))
def test_ranks_have_as_many_micro_batches_as_when_they_are_dealt_in_order(step, budget: int):
    ranks = len(step[1])
    how = {"max_tokens": budget, "padded": False, "shares": False}
    plan = plan_rows([outlines_of(of_rank) for of_rank in step[1]], **how)
    counts = sorted(map(len, plan))
    pieces = len(old_pieces(step[1], **how))
    assert sum(counts) == pieces
    assert counts[-1] <= max(1, -(-pieces // ranks)) + 1
    assert len(dealt(step, **how)[0]) == max(1, counts[-1])


@example(homes=[[0, 0, 1, 1, 1], [1, 1], [], [], []])
@SHARED
@given(homes=st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=5, max_size=5))
def test_few_rows_leave_the_rank_that_drew_them(homes: list[list[int]]):
    batches = [[(home, 0) for home in batch] for batch in homes]
    owners = owners_of(batches)
    assert sorted(owners) == list(range(5))

    def stay(ranks: Sequence[int]) -> int:
        return sum(batch.count(rank) for batch, rank in zip(homes, ranks, strict=True))

    best = max(map(stay, itertools.permutations(range(5))))
    assert stay(owners) >= max(best / 2, stay(range(5)))


def group_of(place: int, *, size: int, prompts: PromptPair) -> list[Weighed]:
    made = [Rollout(prompts, (3,) * (place + 5), "stop", (), place, number) for number in range(size)]
    return [(rollout, [1.0] * len(rollout.completion_ids)) for rollout in made]


def test_groups_that_share_their_prompts_and_fill_a_micro_batch_stay_where_they_are():
    prompts = [PromptPair(Problem(str(i), "q", "s", "1"), (1,) * 20, (2,) * 40) for i in range(16)]
    drawn = [group_of(15 - rank, size=4, prompts=prompts[15 - rank]) for rank in range(16)]

    def work(ranks):
        rows = SharedRows(drawn[ranks.rank], ranks, prompts.__getitem__)
        before = ranks.sent
        rows.dealt(max_tokens=130, padded=False, shares=True)
        return ranks.sent - before

    sent, _ = on_ranks(16, work)
    assert sum(sent[1:]) == 0


@pytest.mark.parametrize("size", [16, 64])
def test_what_a_rank_sends_and_receives_does_not_grow_with_the_ranks(size: int):
    prompts = [PromptPair(Problem(str(i), "q" * 300, "s" * 900, "1"), (7,) * 200, (8,) * 500) for i in range(size)]

    def work(ranks):
        drawn = group_of(ranks.rank % 50, size=2, prompts=prompts[ranks.rank])
        own = [(replace(rollout, place=ranks.rank), weights) for rollout, weights in drawn]
        SharedRows(own, ranks, prompts.__getitem__).dealt(max_tokens=2000, padded=False, shares=False)

    _, ranks = on_ranks(size, work)
    assert max(rank.sent + rank.received for rank in ranks[1:]) < 4000
    assert ranks[0].sent + ranks[0].received < 4000 + 600 * size


def test_rows_are_dealt_again_where_memory_has_run_out():
    prompts = [PromptPair(Problem(str(i), "q", "s", "1"), (1,) * 4, (2,) * 6) for i in range(6)]
    drawn = [[one for place in range(rank, 6, 3) for one in group_of(place, size=2, prompts=prompts[place])]
             for rank in range(3)]  # fmt: skip

    def work(ranks):
        rows = SharedRows(drawn[ranks.rank], ranks, prompts.__getitem__)
        return [rows.dealt(max_tokens=tokens, padded=False, shares=False) for tokens in (60, 30)]

    results, _ = on_ranks(3, work)
    for attempt, tokens in enumerate((60, 30)):
        batches = [batch for twice in results for batch in twice[attempt] if batch]
        assert sorted(batches, key=repr) == sorted(
            old_pieces(drawn, max_tokens=tokens, padded=False, shares=False), key=repr
        )


def test_samples_come_from_where_they_were_drawn_and_scored():
    prompts = [PromptPair(Problem(str(i), "q", "s", "1"), (1,), (2,)) for i in range(4)]
    drawn = [group_of(place, size=2, prompts=prompts[place]) for place in range(4)]

    def work(ranks):
        rows = SharedRows(drawn[ranks.rank], ranks, prompts.__getitem__)
        scored = {(place, number): [float(place)] for place in range(4) for number in range(2)
                  if (place + number) % 4 == ranks.rank}  # fmt: skip
        keys = chosen_keys(rows.keys, count=3, seed=5)
        return rows.distinct, collect_samples(keys, [rollout for rollout, _ in drawn[ranks.rank]], scored, ranks)

    ((distinct, samples), *others), _ = on_ranks(4, work)
    everything = [rollout for of_rank in drawn for rollout, _ in of_rank]
    chosen = chosen_keys([rollout.key for rollout in everything], count=3, seed=5)
    assert [sample.rollout for sample in samples] == [one for one in everything if one.key in chosen]
    assert [sample.token_losses for sample in samples] == [[float(place)] for place, _ in chosen]
    assert distinct == 4
    assert others == [(0, [])] * 3


@pytest.mark.slow
def test_processes_tell_each_other_the_same(tmp_path: Path):
    """Over gloo: three ranks on two machines, of which one reads for both of its ranks."""
    run_ranks([TESTS / "sharing_ranks.py", tmp_path], 3)
    assert (tmp_path / "read_by").read_text().split() == ["0", "2"]
