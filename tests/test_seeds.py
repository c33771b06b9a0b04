"""Order and seeds are functions of (seed, step, index)."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_cli.data.problems import Problem, PromptPair
from opsd_cli.data.seeds import derive_seed, epoch_order
from opsd_cli.data.stream import PromptStream


def pairs(count: int) -> list[PromptPair]:
    return [PromptPair(Problem(str(i), "q", "s", "a"), (i,), (i,)) for i in range(count)]


def stream_without(unfit: set[int], length: int, *, seed: int, places: int) -> tuple[PromptStream, list[int]]:
    """A stream in which some problems do not fit, and the positions that it renders."""
    rendered: list[int] = []

    def render(positions: Sequence[int]) -> list[PromptPair | None]:
        rendered.extend(positions)
        return [None if i in unfit else pairs(length)[i] for i in positions]

    return PromptStream(length, render, seed=seed, places=places), rendered


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), per_step=st.integers(1, 60), seed=st.integers(0, 99))
def test_steps_cut_a_stream_of_whole_epochs(length: int, per_step: int, seed: int):
    steps = -(-3 * length // per_step)
    drawn, _ = stream_without(set(), length, seed=seed, places=steps * per_step)
    stream = [
        p.student_ids[0] for step in range(steps) for p in drawn.at(range(step * per_step, (step + 1) * per_step))
    ]
    for epoch in range(3):
        part = stream[epoch * length : (epoch + 1) * length]
        assert part == epoch_order(length, seed=seed, epoch=epoch)
        assert sorted(part) == list(range(length))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(0, 9), st.integers(1, 50), st.integers(0, 50), st.sets(st.integers(0, 29)))
def test_problems_that_do_not_fit_are_passed_over_and_more_steps_are_the_same_stream(length, seed, places, more, unfit):
    unfit = {i for i in unfit if i < length - 1}
    short, _ = stream_without(unfit, length, seed=seed, places=places)
    long, _ = stream_without(unfit, length, seed=seed, places=places + more)
    assert short.at(range(places)) == long.at(range(places))
    assert short.at(range(places + more)) == long.at(range(places + more))
    first_epoch = [i for i in epoch_order(length, seed=seed, epoch=0) if i not in unfit]
    drawn = [pair.student_ids[0] for pair in long.at(range(places))]
    assert drawn[: len(first_epoch)] == first_epoch[: len(drawn)]


def test_only_the_problems_that_a_run_comes_to_are_rendered():
    _, rendered = stream_without(set(), 1000, seed=0, places=32)
    assert sorted(rendered) == sorted(epoch_order(1000, seed=0, epoch=0)[:32])
    unfit = set(epoch_order(1000, seed=0, epoch=0)[:2])
    stream, rendered = stream_without(unfit, 1000, seed=0, places=32)
    assert len(rendered) == 34
    assert len(stream.rendered) == 32


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(20, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_seed_depends_on_every_part_and_fits_a_generator():
    seeds = {derive_seed(0, "rollout", step, g) for step in range(10) for g in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "a") == derive_seed(1, "a")
