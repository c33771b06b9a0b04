"""What an adapter has learnt arrives: in completions, merged weights and the exported folder, in half precision too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
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
from opsd_cli.engine.export import Exporter
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
from opsd_cli.engine.weight_copies import MergedCopy
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


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_an_average_of_merged_weights_takes_the_update_in_the_weight_s_own_layout(name: str):
    lm = adapted(name)
    copy = MergedCopy(lm, lambda parameters: nullcontext())
    rows = agreement.probe_rows(lm)
    wanted_NV = agreement.model_logits(lm, rows)
    with copy.swapped_in(), lm.disable_adapter():
        assert float(agreement.deviation(agreement.model_logits(lm, rows), wanted_NV).max()) < 1e-4


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
    exporter = Exporter(engine.policy, engine.source, tokenizer, export_dtype=export_dtype, own_template=False)
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
