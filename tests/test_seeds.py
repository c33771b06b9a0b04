"""Order and seeds are functions of (seed, step, index)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_cli.data.seeds import derive_seed, epoch_order, positions_of_step


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), per_step=st.integers(1, 60), seed=st.integers(0, 99))
def test_steps_cut_a_stream_of_whole_epochs(length: int, per_step: int, seed: int):
    steps = -(-3 * length // per_step)
    stream = [p for step in range(steps) for p in positions_of_step(length, step=step, per_step=per_step, seed=seed)]
    for epoch in range(3):
        part = stream[epoch * length : (epoch + 1) * length]
        assert part == epoch_order(length, seed=seed, epoch=epoch)
        assert sorted(part) == list(range(length))


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(20, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_seed_depends_on_every_part_and_fits_a_generator():
    seeds = {derive_seed(0, "rollout", step, g) for step in range(10) for g in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "a") == derive_seed(1, "a")
