"""A model that does not fit a card beside its shards: completions are drawn with weights that are gathered a layer at a
time."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_ranks import ADAPTERS, CASES
from pretend_device import DEVICE, PretendedDevice
from support import TESTS, run_ranks
from torch import nn
from zoo import FAMILIES

from opsd_cli.engine import agreement
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source, load_causal
from opsd_cli.engine.placement import ROOM_TO_DRAW, why_by_layer
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import alone

CPU = torch.device("cpu")
WAYS = ("layer", "model")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layers")
    for kind in sorted({kind for kind, _, _ in CASES.values()}):
        FAMILIES[kind].make(root / kind)
    for way in WAYS:
        run_ranks([TESTS / "layer_ranks.py", root, way, ",".join(CASES)], 2)
    return root


def found(root: Path, case: str, way: str, rank: int) -> dict[str, Any]:
    return json.loads((root / f"{case} {way} {rank}.json").read_text())


def numbers(root: Path, kind: str) -> tuple[int, int, int]:
    """Of a model: all, those outside of its layers, those of its largest layer."""
    causal = load_causal(Source(str(root / kind), None, torch.float32, "sdpa", False, True))
    (layers,) = (module for module in causal.modules() if isinstance(module, nn.ModuleList) and len(module) == 2)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    whole = sum(parameter.numel() for parameter in causal.parameters())
    return whole, whole - sum(sizes), max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_same_is_drawn_though_one_rank_draws_nothing(root: Path, case: str):
    layer, model = (found(root, case, way, 0) for way in WAYS)
    for when in ("drawn", "drawn after an update"):
        assert [ids for ids, _ in layer[when]] == [ids for ids, _ in model[when]]
        ours, theirs = ([value for _, values in one[when] for value in values] for one in (layer, model))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert found(root, case, "layer", 1)[when] == []
    assert layer["drawn"] != layer["drawn after an update"]
    assert "its weights are gathered a layer at a time, for every token: zero.gather=layer" in layer["how"]
    assert ("over a cache that stays where it is: its" in layer["how"]) == (CASES[case][0] in ("qwen3", "mixtral"))
    assert "gathered" not in model["how"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_rank_ever_holds_more_than_a_layer_beside_what_is_around_them(root: Path, case: str):
    kind, adapter, _ = CASES[case]
    whole, around, largest = numbers(root, kind)
    for rank in range(2):
        layer, model = (found(root, case, way, rank) for way in WAYS)
        factors = 0 if adapter == "all weights" else model["most"] - whole
        assert layer["most"] == around + largest + factors // 2
        assert layer["most merged"] == model["most merged"] == max(around, largest + factors // 2)
        assert model["most"] == whole + factors


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_and_handed_over_is_the_same_to_the_last_bit(root: Path, case: str):
    layer, model = (torch.load(root / f"{case} {way}.pt") for way in WAYS)
    for what in ("weights", "merged"):
        assert layer[what].keys() == model[what].keys()
        assert all(torch.equal(layer[what][name], model[what][name]) for name in model[what])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture_computes_the_same_logits_layer_by_layer(name: str, tmp_path: Path):
    FAMILIES[name].make(tmp_path)
    source = Source(str(tmp_path), None, torch.float32, "sdpa", False, True)
    policy = Policy(load_causal(source), layout="padded")
    view = GenerationView(policy, source, ADAPTERS["all weights"])
    open_at_once: list[int] = []

    def gather(parameters):
        open_at_once.append(len(parameters))
        return nullcontext()

    with torch.inference_mode():
        rows = agreement.probe_rows(policy.causal)
        with view.with_weights(gather) as lm:
            whole_NV = agreement.model_logits(lm, rows)
        calls, alone_ranks = len(open_at_once), alone()
        with view.by_layer(gather, alone_ranks) as lm:
            layers_NV = agreement.model_logits(lm, rows)
    assert torch.equal(whole_NV, layers_NV)
    assert len(open_at_once) > calls + 2  # more than what is around the layers
    merged = dict(view.merged_by_layer(gather))
    own = dict(policy.lm.named_parameters())
    assert merged.keys() == own.keys()
    assert all(torch.equal(merged[key], own[key]) for key in own)


def test_a_pass_that_fails_ends_with_its_error_and_leaves_nothing_gathered(tmp_path: Path):
    FAMILIES["llama"].make(tmp_path)
    source = Source(str(tmp_path), None, torch.float32, "sdpa", False, True)
    policy = Policy(load_causal(source), layout="padded")
    view = GenerationView(policy, source, ADAPTERS["all weights"])
    with view.by_layer(lambda parameters: nullcontext(), alone()) as lm:
        broken = lm.model.layers[1].mlp
    broken.forward = lambda states: states[:, :, :1] @ states
    with pytest.raises(RuntimeError), view.by_layer(lambda parameters: nullcontext(), alone()) as lm:
        lm(input_ids=torch.tensor([[1, 2]]))
    assert {parameter.device.type for parameter in lm.parameters()} == {"meta"}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lm.modules())


@pytest.mark.parametrize(
    ("asked", "free", "why"),
    [
        ("auto", 1.1, ""),
        ("auto", 0.9, "all 0.0 GiB of them do not fit into the 0.0 GiB that are free"),
        ("layer", 1.1, "zero.gather=layer"),
        ("model", 0.9, ""),
    ],
)
def test_layers_are_gathered_one_at_a_time_where_a_card_has_no_room_for_all(asked: str, free: float, why: str):
    parameters = list(nn.Linear(1000, 1000).parameters())
    with PretendedDevice():
        torch.lazy.mem_get_info = lambda device: (int(free * 4 * 1001 * 1000 / ROOM_TO_DRAW), 2**30)
        torch.lazy.memory_reserved = torch.lazy.memory_allocated = lambda device: 0
        assert why_by_layer(asked, parameters, DEVICE, alone()) == why
    assert not why_by_layer("auto", parameters, CPU, alone())
