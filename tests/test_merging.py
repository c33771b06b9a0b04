"""What an adapter has learnt arrives: in completions, merged weights and the exported folder, in half precision too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_process import OneProcessEngine, one_rank, parts_of
from peft import PeftModel
from recipe_support import config_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from zoo import FAMILIES
from zoo_run import WORDS, config_for

from opsd_cli.engine import agreement, merging
from opsd_cli.engine.export import Exporter, save_adapter
from opsd_cli.engine.loading import add_adapter, find_source
from opsd_cli.engine.merging import (
    adapted_layers,
    kept_share,
    merged_parameters,
    plain_name,
    rehearse_merge,
    update_of,
    weight_of,
)
from opsd_cli.engine.weight_copies import UpdateCopy
from opsd_cli.engine.wide_adapters import HALF, WideAdapter, adapters_in_words, cast
from opsd_cli.sampling.llama_weights import layers_of
from opsd_cli.settings.config import LoraSettings
from opsd_cli.settings.errors import ConfigError
from opsd_cli.training.loop import train_step

pytestmark = pytest.mark.slow

LORA = LoraSettings(rank=4, alpha=8, dropout=0.0, targets=("all-linear",))


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with one_rank():
        yield


def adapted(name: str, dtype: torch.dtype = torch.float32, *, size: float = 0.1) -> PeftModel:
    """A model with an adapter that has learnt something: every factor is random."""
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(FAMILIES[name].config(), dtype=dtype).eval()
    lm = add_adapter(causal, replace(LORA, targets=FAMILIES[name].targets), seed=0).to(dtype)
    for layer in adapted_layers(lm).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=size)
    return lm.requires_grad_(False)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "llama"])
def test_merged_weights_compute_what_the_adapter_does(name: str):
    """Also where weights are stored transposed, or experts as one tensor."""
    lm = adapted(name)
    rows = agreement.probe_rows(lm)
    wanted_NV = agreement.model_logits(lm, rows)
    plain = AutoModelForCausalLM.from_config(FAMILIES[name].config()).eval()
    merged = dict(merged_parameters(lm))
    plain.load_state_dict(merged, strict=False)
    assert {name for name, _ in plain.named_parameters()} == merged.keys()
    assert float(agreement.deviation(agreement.model_logits(plain, rows), wanted_NV).max()) < 1e-4
    assert torch.equal(agreement.model_logits(lm, rows), wanted_NV)  # the adapter is as it was


SHARE = 0.25  # by which the average moves
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.6}  # of what separates it from the model without any update


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "llama"])
def test_a_teacher_answers_as_the_student_would_with_the_averaged_update(name: str, dtype: torch.dtype):
    """Small updates: merged into weights in bfloat16 they leave the logits where they were. Also where weights are
    stored transposed, or experts as one tensor."""
    lm = adapted(name, dtype, size=1e-3)
    rows = agreement.probe_rows(lm)
    layers = adapted_layers(lm)
    first = {key: layer.lora_B["default"].weight.clone() for key, layer in layers.items()}
    copy = UpdateCopy(lm, lambda parameters: nullcontext())
    learn_again(lm, size=1e-3)
    copy.move_towards_weights(SHARE)
    with lm.disable_adapter():
        base_NV = agreement.model_logits(lm, rows)
        with copy.swapped_in():
            teacher_NV = agreement.model_logits(lm, rows)
        assert torch.equal(agreement.model_logits(lm, rows), base_NV)
    for key, layer in layers.items():  # both updates have one lora_A, so their average is that of lora_B
        layer.lora_B["default"].weight.lerp_(first[key], 1 - SHARE)
    student_NV = agreement.model_logits(lm, rows)
    apart = agreement.deviation(teacher_NV, student_NV).median() / agreement.deviation(base_NV, student_NV).median()
    assert float(apart) < LIMITS[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_average_that_moves_in_small_shares_loses_nothing(dtype: torch.dtype):
    """As after steps at a rate of 5e-6: each time a thousandth of what lies between two such updates."""
    lm = adapted("llama", dtype, size=1e-6)
    copy = UpdateCopy(lm, lambda parameters: nullcontext())
    first = {name: update_of(layer).double() for name, layer in adapted_layers(lm).items()}
    learn_again(lm, size=2e-6)
    for _ in range(20):
        copy.move_towards_weights(1e-3)
    for name, layer in adapted_layers(lm).items():
        moved = (1 - (1 - 1e-3) ** 20) * (update_of(layer).double() - first[name])
        found = copy._copies[f"{name}.update"].double() - first[name]
        assert float((found - moved).norm() / moved.norm()) < 1e-3


def learn_again(lm: PeftModel, *, size: float) -> None:
    """Another update for every adapter, with the same lora_A."""
    torch.manual_seed(1)
    for layer in adapted_layers(lm).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=size)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_adapters_of_experts_and_routers_lose_nothing_in_half_precision(name: str):
    """peft adds them to the weights, and in bfloat16 that holds half of such an update."""
    lm = adapted(name, torch.bfloat16, size=3e-4)
    assert kept_share(lm, torch.bfloat16) < 0.6
    outermost = [layer for layer in adapted_layers(lm).values() if isinstance(layer, WideAdapter)]
    outermost = [layer for layer in outermost if all(layer is not other.base_layer for other in outermost)]
    assert len(outermost) in (2, 4)  # experts and router of each layer that has them
    states_ND = torch.randn(4000, 32, dtype=torch.bfloat16)
    for layer in outermost:
        routed = layer.parameter_name == "weight"
        rest = () if routed else (torch.randint(0, 4, (4000, 2)), torch.rand(4000, 2, dtype=torch.bfloat16))
        exact = deepcopy(layer.get_base_layer()).float()
        wide = cast((states_ND, *rest), torch.float32, of=HALF)
        before = first_of(exact(*wide))
        for adapter in layer.modules():
            if isinstance(adapter, WideAdapter):
                exact.get_parameter(adapter.parameter_name).data += update_of(adapter)
        moved = first_of(exact(*wide)) - before
        with lm.disable_adapter():
            off = first_of(layer(states_ND, *rest)).float()
        arrived = ((first_of(layer(states_ND, *rest)).float() - off) * moved).sum() / moved.square().sum()
        assert float(arrived) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", []),
        ("qwen3_moe", ["adapters also on experts.down_proj, experts.gate_up_proj, gate.weight, computed in float32"]),
        ("gpt_oss", ["no adapters on experts.down_proj, experts.gate_up_proj: they are no linear layers"]),
    ],
)
def test_it_is_said_which_experts_have_adapters_and_which_have_none(name: str, words: list[str]):
    lines = adapters_in_words(adapted(name, torch.bfloat16))
    assert len(lines) == len(words)
    assert all(line.startswith(f"lora: {part}") for line, part in zip(lines, words, strict=True))


def first_of(made):
    """What a module returns, or the first of several things."""
    return made[0] if isinstance(made, tuple) else made


def test_the_adapter_of_fused_experts_is_exported_as_it_was_trained(tmp_path: Path):
    lm = adapted("qwen3_moe")
    save_adapter(lm, dict(lm.named_parameters()), tmp_path)
    base = AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"].config())
    loaded = adapted_layers(PeftModel.from_pretrained(base, tmp_path))
    for name, layer in adapted_layers(lm).items():
        torch.testing.assert_close(update_of(loaded[name]), update_of(layer))


def test_a_merge_that_is_not_what_the_adapter_does_is_refused_before_training(monkeypatch: pytest.MonkeyPatch):
    lm = adapted("gpt2")
    rehearse_merge(lm)
    monkeypatch.setattr(merging, "merged_weight", lambda layer: weight_of(layer).data + 2 * update_of(layer))
    with pytest.raises(ConfigError, match=r"transformer\.h\.0\..* \(Conv1D\) cannot be merged, .*deviates by"):
        rehearse_merge(lm)


def test_completions_in_half_precision_are_those_of_the_adapter_beside_its_weights():
    """Merged, the small updates would be rounded away, while the loss sees them."""
    lm = adapted("llama", torch.bfloat16, size=1e-4)
    assert kept_share(lm, torch.bfloat16) < 0.5
    states_ND = torch.randn(5, 32, dtype=torch.bfloat16)
    attention = lm.get_base_model().model.layers[0].self_attn
    modules = (attention.q_proj, attention.k_proj, attention.v_proj)
    joint = layers_of(lm.get_base_model())[0].query_key_value
    assert len(joint.weights) == 1
    wanted = torch.cat([module(states_ND) for module in modules], dim=1)
    torch.testing.assert_close(joint(states_ND), wanted, rtol=1e-2, atol=1e-2)
    ((down, up),) = joint.low_rank
    updates = torch.cat([update_of(module) for module in modules])
    torch.testing.assert_close(up.float() @ down.float(), updates, rtol=2e-2, atol=1e-6)


def test_in_float32_completions_are_those_of_merged_weights():
    (fused, _) = layers_of(adapted("llama").get_base_model())
    assert fused.query_key_value.low_rank == (None,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[OneProcessEngine, Path]:
    """Ten steps of an adapter on bfloat16 weights at the default rate."""
    root = tmp_path_factory.mktemp("half")
    FAMILIES["llama"].make(root / "llama")
    default = config_of("recipe=gsm8k", "dataset=arithmetic").optim.lr
    base = config_of(*WORDS, f"optim.lr={default}", "train.problems_per_step=1", "sampling.max_completion_tokens=4")
    config = config_for("llama", root / "llama", base, rank=4)
    source = find_source(replace(config.model, dtype="bfloat16"), dtype=torch.bfloat16)
    engine = OneProcessEngine(config, source, torch.device("cpu"))
    parts = parts_of(engine, config)
    for step in range(10):
        train_step(step, parts, updates=step)
    return engine, root


@pytest.mark.parametrize(("export_dtype", "written"), [("auto", "float32"), ("weights", "bfloat16")])
def test_an_export_at_the_default_rate_says_what_merging_loses(trained, export_dtype: str, written: str):
    engine, root = trained
    folder = root / export_dtype
    tokenizer = AutoTokenizer.from_pretrained(engine.source.path)
    exporter = Exporter(engine.source, tokenizer, export_dtype=export_dtype, own_template=False)
    note = exporter.export(engine, folder)
    with engine.generating() as lm:
        kept = kept_share(lm, torch.bfloat16)
    assert kept < 0.5
    assert f"{100 * kept:.0f} % of what the adapter has learnt" in note
    assert "float32" in note
    assert "model/adapter" in note
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert str(exported.dtype) == f"torch.{written}"
    arrived = share_that_arrived(exported, folder / "adapter", root / "llama")
    assert arrived == pytest.approx(1.0 if written == "float32" else kept, abs=0.02)


def share_that_arrived(exported: PreTrainedModel, adapter: Path, base: Path) -> float:
    """Of the update, from the folders alone: how far the weights have moved in its direction."""
    as_trained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float()
    moved = whole = 0.0
    for name, layer in adapted_layers(PeftModel.from_pretrained(as_trained, adapter)).items():
        update, weight = update_of(layer), exported.get_parameter(plain_name(f"{name}.weight")).float()
        moved += float((update * (weight - weight_of(layer))).sum())
        whole += float(update.square().sum())
    return moved / whole
