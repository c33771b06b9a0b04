"""The prompt of a group scored once: the same loss and the same gradient as when every row has its own, in every
layout, and a plan of micro-batches that keeps groups together."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from recipe_support import config_of

from opsd_cli.api import Session
from opsd_cli.data.microbatches import plan_microbatches
from opsd_cli.data.pairing import pair, shared_length, whole_rows
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.engine import packed
from opsd_cli.engine.loading import Source, load_causal, resolve
from opsd_cli.engine.packed import LayoutChoice, usable_layout
from opsd_cli.engine.process_group import alone
from opsd_cli.teachers.teachers import score_target

NUMBERS = random.Random(0)
GROUPS = ((3, 9, 1), (5,), (2, 2))
"""Lengths of the completions of three problems."""


def ids(count: int) -> tuple[int, ...]:
    return tuple(NUMBERS.randrange(3, 900) for _ in range(count))


def group(place: int, completions: tuple[int, ...], *, own_teacher: bool = False) -> list[Rollout]:
    """Rollouts of one problem; with `own_teacher` each has a teacher's prompt of its own, as under context=sibling."""
    student, teacher = ids(6 + place), ids(20 + place)
    prompts = [
        PromptPair(Problem(str(place), "", "", "1"), student, ids(21) if own_teacher else teacher) for _ in completions
    ]
    return [
        Rollout(prompt, ids(length), "stop", (), place, number)
        for number, (prompt, length) in enumerate(zip(prompts, completions, strict=True))
    ]


def weighed(rollouts: list[Rollout]):
    return [(rollout, [1.0 + 0.1 * n for n in range(len(rollout.completion_ids))]) for rollout in rollouts]


def rollouts_of_groups(*, own_teacher: bool = False) -> list[Rollout]:
    made = [group(place, lengths, own_teacher=own_teacher) for place, lengths in enumerate(GROUPS)]
    return [rollout for one in made for rollout in one]


@pytest.mark.parametrize("own_teacher", [False, True])
def test_a_prompt_stands_once_and_every_row_can_be_read_back(own_teacher: bool):
    made = weighed(rollouts_of_groups(own_teacher=own_teacher))
    ((whole,), (once,)) = (pair([made], shares=shares) for shares in (False, True))
    assert whole.student.shared == ()
    for name in ("student", "teacher"):
        mine, other = getattr(once, name), getattr(whole, name)
        assert mine.lengths == other.lengths
        assert mine.tokens == len(mine.input_ids_L)
        places_W, back_L = whole_rows(mine.lengths, mine.shared or (0,) * len(mine.lengths))
        assert torch.equal(mine.input_ids_L[places_W], other.input_ids_L)
        assert torch.equal(places_W[back_L], torch.arange(mine.tokens))
        assert torch.equal(places_W[other.predict_N], mine.predict_N)
    spared = 2 * 6 + 1 * 8
    assert once.student.tokens == whole.student.tokens - spared
    assert once.teacher.tokens == whole.teacher.tokens - (0 if own_teacher else 2 * 20 + 1 * 22)
    longest = max(once.student.tokens, once.teacher.tokens)
    assert shared_length([rollout for rollout, _ in made]) == longest


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_groups_stay_together_within_the_budget_and_every_rollout_is_planned_once(ranks: int):
    numbers = random.Random(ranks)
    made = [
        group(place, tuple(numbers.randrange(1, 40) for _ in range(numbers.randrange(1, 9)))) for place in range(12)
    ]
    drawn = [[one for rollouts in made[rank::ranks] for one in weighed(rollouts)] for rank in range(ranks)]
    for budget in (60, 200, 10_000):
        plans = [
            plan_microbatches(drawn, rank=rank, max_tokens=budget, padded=False, shares=True) for rank in range(ranks)
        ]
        batches = [[rollout for rollout, _ in batch] for plan in plans for batch in plan]
        keys = [rollout.key for batch in batches for rollout in batch]
        assert sorted(keys) == sorted(rollout.key for rollouts in made for rollout in rollouts)
        assert all(shared_length(batch) <= budget or len(batch) == 1 for batch in batches)
        for batch in batches:
            places = [rollout.place for rollout in batch]
            assert places == sorted(places, key=places.index), "the rollouts of a problem stand next to each other"
    assert sum(len(plan) for plan in plans) <= ranks, "one micro-batch holds all"


def test_single_rollouts_are_planned_as_without_sharing():
    drawn = [weighed([rollout for place in range(20) for rollout in group(place, (place % 7 + 1,))])]
    plans = [plan_microbatches(drawn, rank=0, max_tokens=120, padded=False, shares=shares) for shares in (False, True)]
    assert plans[0] == plans[1]
    assert pair(plans[1], shares=True)[0].teacher.shared == ()


# The model ---------------------------------------------------------------------------------------------------------


def session_of(*words: str) -> Session:
    return Session(config_of("recipe=quickstart", "teacher=live", "dataset.train_problems=8", "eval.problems=0",
                             "dataset.retention_problems=0", "sampler=static", *words))  # fmt: skip


def loss_and_gradient(session: Session, made, *, shares: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of one micro-batch, teacher's pass and all."""
    (batch,) = pair([made], shares=shares)
    parts, engine = session._parts, session.engine
    loss = engine.student_loss(batch, score_target(parts.teacher, batch, session.config.target), parts.objective)
    engine.backward(loss.weighted_sum, denominator=batch.weight, last=True)
    gradient = {n: p.grad.clone() for n, p in session.model.named_parameters() if p.grad is not None}
    engine.drop_gradients()
    return loss.value_N.detach(), gradient


def deviation(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative, of all gradients together."""
    apart = sum(float((got[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (apart / sum(float(gradient.double().square().sum()) for gradient in wanted.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [(), ("lora=r16", "lora.targets=[q_proj,k_proj,v_proj,down_proj]")], ids=["all", "LoRA"]
)
def test_the_gradient_is_that_of_rows_with_prompts_of_their_own(words: tuple[str, ...]):
    with session_of(*words, "train.gradient_checkpointing=true") as session:
        session.model.train()
        made = weighed(rollouts_of_groups())
        if words:  # an adapter begins at zero, where half of its gradient is zero
            for name, parameter in session.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
        value, wanted = loss_and_gradient(session, made, shares=False)
        assert session.engine.shares
        for layout in ("packed", "padded"):
            if layout == "padded":
                session.engine.policy.layout, session.engine.policy.shares = "padded", False
                session.engine.policy.causal.set_attn_implementation("sdpa")
            got_value, got = loss_and_gradient(session, made, shares=True)
            assert got.keys() == wanted.keys()
            torch.testing.assert_close(got_value, value, rtol=1e-4, atol=1e-6)
            assert deviation(got, wanted) < 1e-5, layout
            # What goes wrong is seen: a prompt of another problem in one row.
        (first, *rest) = made
        broken = [(Rollout(rest[0][0].prompt, first[0].completion_ids, "stop", ()), first[1]), *rest]
        assert deviation(loss_and_gradient(session, broken[1:], shares=True)[1], wanted) > 1e-2


@pytest.mark.slow
def test_in_bfloat16_sharing_adds_no_more_than_rounding_does():
    made = weighed(rollouts_of_groups())
    with session_of("model.dtype=float32") as session:
        _, exact = loss_and_gradient(session, made, shares=False)
    with session_of("model.dtype=bfloat16") as session:
        whole, once = (loss_and_gradient(session, made, shares=shares)[1] for shares in (False, True))
    noise = deviation(whole, exact)
    assert noise > 1e-4
    assert deviation(once, exact) < 1.5 * noise
    assert deviation(once, whole) < 1.5 * noise


def test_a_model_that_sees_where_its_rows_begin_is_not_given_shared_prompts():
    """The trial at load: here the tokens of a row are counted from the row's beginning in the batch."""
    path, _, _ = resolve("bundled:tiny", None, key="model.path")
    source = Source(path, None, torch.float32, "sdpa", False, True)
    assert usable_layout(load_causal(source), alone()) == LayoutChoice("packed")
    causal = load_causal(source)
    decoder = causal.get_decoder()
    forward = decoder.forward

    def counting(*args, position_ids=None, **rest):
        if position_ids is not None:
            follows = position_ids == position_ids.roll(1) + 1
            position_ids = position_ids.where(follows, 0)
        return forward(*args, position_ids=position_ids, **rest)

    decoder.forward = counting
    choice = usable_layout(causal, alone())
    assert choice.layout == "packed"
    assert choice.unshared.startswith("logits of rows that share a prompt deviate from those of rows with their own")


def test_the_kernel_for_rows_of_any_lengths_is_given_whole_rows(monkeypatch: pytest.MonkeyPatch):
    """The kernel runs on GPUs only; in its place stands attention row by row."""

    def row_by_row(query_LHE, key_LhE, value_LhE, bounds, *, longest, scale):
        assert longest == max(b - a for a, b in pairwise(bounds))
        rows = [slice(a, b) for a, b in pairwise(bounds.tolist())]
        attend = torch.nn.functional.scaled_dot_product_attention
        parts = [[tensor[row].transpose(0, 1) for tensor in (query_LHE, key_LhE, value_LhE)] for row in rows]
        return torch.cat([attend(*part, is_causal=True, scale=scale).transpose(0, 1) for part in parts])

    monkeypatch.setattr(packed, "rows_attention", row_by_row)
    lengths, shared, cpu = (9, 8, 5, 7), (0, 6, 0, 3), torch.device("cpu")
    tokens = sum(lengths) - sum(shared)
    parts = [torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(3)]
    found = []
    for rows in (
        packed.row_bounds(lengths, cpu, shared=shared),
        packed.row_groups(lengths, cpu, shared=shared),
    ):
        out, _ = packed.packed_attention(torch.nn.Identity(), *parts, None, rows=rows)
        assert out.shape == (1, tokens, 2, 8)
        found.append([out, *torch.autograd.grad(out.square().sum(), parts)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)
