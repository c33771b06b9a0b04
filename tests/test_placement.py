"""A model that is larger than a card: at stage 3 its weights become shards one parameter after another, and where a
card has no room for all of them they are checked on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deep_models import deep_model
from pretend_device import CPU, DEVICE, PretendedDevice
from recipe_support import config_of
from support import TESTS, run_ranks
from transformers import AutoTokenizer

from opsd_cli.engine.loading import ASSETS, find_source
from opsd_cli.engine.placement import ROOM, whole_bytes
from opsd_cli.engine.process_group import alone
from opsd_cli.rank.build import build_policy

NOISE = 12 * 2**20  # of a process beside its tensors
CASES = ("in turn", "whole")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("placement")
    shape = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    model = deep_model("qwen3", torch.float32, **shape)
    model.save_pretrained(root / "model")
    AutoTokenizer.from_pretrained(ASSETS / "tiny").save_pretrained(root / "model")
    (root / "sizes.json").write_text(json.dumps([4 * parameter.numel() for parameter in model.parameters()]))
    for case in CASES:
        run_ranks([TESTS / "placement_ranks.py", root, case], 2)
    return root


@pytest.mark.slow
def test_a_model_and_a_teacher_become_shards_without_being_whole_on_any_rank(root: Path):
    sizes = json.loads((root / "sizes.json").read_text())
    most = sum(sizes) / 2 + max(sizes) + NOISE
    assert most < 0.8 * sum(sizes)
    for rank in range(2):
        found = json.loads((root / f"in turn_{rank}.json").read_text())
        assert found["shards"]
        assert found["teacher shards"]
        assert found["highest"] < most
        assert found["teacher highest"] < most
    by_itself = json.loads((root / "whole_1.json").read_text())  # rank 1 is sent all weights, and keeps them
    assert by_itself["highest"] > sum(sizes)


@pytest.mark.slow
def test_the_first_update_is_the_same_to_the_last_bit(root: Path):
    in_turn, whole = (torch.load(root / f"{case}.pt") for case in CASES)
    assert in_turn.keys() == whole.keys()
    assert all(torch.equal(in_turn[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("free", "home"), [(0.9, CPU), (1.1, DEVICE)])
def test_weights_stay_on_the_cpu_where_a_card_has_no_room_for_all(free: float, home: torch.device):
    config = config_of("recipe=quickstart", "zero=stage3")
    source = find_source(config.model, dtype=torch.float32)
    with PretendedDevice():
        size = whole_bytes(build_policy(config, source, CPU, alone(), shards=True)[0].parameters())
        torch.lazy.mem_get_info = lambda device: (free * size / ROOM, 2 * size)
        policy, _, _ = build_policy(config, source, DEVICE, alone(), shards=True)
        assert {parameter.device for parameter in policy.parameters()} == {home}
        assert {buffer.device for buffer in policy.buffers()} == {DEVICE}
        whole, _, _ = build_policy(config, source, DEVICE, alone())  # an engine that shards nothing
        assert {parameter.device for parameter in whole.parameters()} == {DEVICE}
