"""Several updates on the rollouts of one step: a moving teacher moves after each. And what a step has to show of its
rollouts: a fair sample, the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recipe_support import config_of
from safetensors.torch import load_file
from support import TESTS, run_ranks
from test_methods import SMALL

from opsd_cli.engine.tensor_shards import TensorShards
from opsd_cli.engine.weight_copies import COPY
from opsd_cli.settings.typed_config import plain_tree
from opsd_cli.training.step_report import chosen_keys

pytestmark = pytest.mark.slow

RATE = 0.25
EMA = (
    *SMALL, "teacher=ema", f"teacher.rate={RATE}", "lora=none", "loss.importance_cap=2.0", "loss.mask_truncated=true",
    "train.problems_per_step=4", "train.rollouts_per_problem=2", "samples.every=1", "samples.count=6",
)  # fmt: skip
TREES = {
    "one": (*EMA, "train.updates_per_step=1"),
    "two": (*EMA, "train.updates_per_step=2"),
    # one problem: a second rank draws nothing and scores what the first one drew
    "alone": (*EMA, "train.problems_per_step=1", "train.rollouts_per_problem=4", "samples.count=3"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {}
    for world_size in (1, 2):
        folders[world_size] = tmp_path_factory.mktemp(f"ranks{world_size}")
        trees = {name: plain_tree(config_of(*words)) for name, words in TREES.items()}
        (folders[world_size] / "trees.json").write_text(json.dumps(trees))
        run_ranks([TESTS / "several_updates_ranks.py", folders[world_size]], world_size)
    return folders


def read(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    with TensorShards(folder, COPY) as shards:
        return {name: shards.whole(name) for name in shards.shapes}


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_average_moves_after_each_of_a_steps_updates(found: dict[int, Path], world_size: int):
    folder = found[world_size]
    assert (read(folder, "one")["updates"], read(folder, "two")["updates"]) == (1, 2)
    start, first, second = (load_file(folder / f"{name}.safetensors") for name in ("start", "one", "two"))
    once, twice = (averaged(folder / f"{name}_teacher") for name in ("one", "two"))
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])
    for name, weight in twice.items():
        expected = torch.lerp(start[name], first[name], RATE)
        torch.testing.assert_close(once[name], expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(weight, torch.lerp(expected, second[name], RATE), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["one", "alone"])
def test_one_and_two_ranks_show_the_same_rollouts(found: dict[int, Path], name: str):
    alone, samples, of_second = (read(found[size], name, rank)["samples"] for size, rank in ((1, 0), (2, 0), (2, 1)))
    assert len(alone) == (6 if name == "one" else 3)
    assert of_second == [], "rank 0 writes them"
    for line, expected in zip(samples, alone, strict=True):
        assert line.pop("divergence") == pytest.approx(expected["divergence"], abs=2e-5)
        assert line == {key: value for key, value in expected.items() if key != "divergence"}


def test_rollouts_that_carry_no_loss_are_shown_without_a_divergence(found: dict[int, Path]):
    samples = read(found[1], "one")["samples"]
    assert {line["finish_reason"] for line in samples} == {"stop", "length"}
    for line in samples:
        scored = 0 if line["finish_reason"] == "length" else len(line["completion_ids"])
        assert len(line["divergence"]) == scored


def test_every_rollout_of_a_step_is_shown_equally_often_wherever_it_was_drawn():
    times = dict.fromkeys(range(8), 0)
    for step in range(1000):
        keys = [(place, number) for place in (2 * step, 2 * step + 1) for number in range(4)]
        shown = [chosen_keys(drawn, count=2, seed=5) for drawn in (keys, keys[4:] + keys[:4], keys[::-1])]
        assert shown[0] == shown[1] == shown[2] == sorted(shown[0])
        for place, number in shown[0]:
            times[4 * (place % 2) + number] += 1
    assert sum(times.values()) == 2000
    assert all(190 < count < 310 for count in times.values()), times  # 250 with a standard deviation of 14
