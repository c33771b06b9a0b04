"""Weights and adapters are counted from a config.json alone, as torch counts them on its meta device; what cannot be
counted is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_support import config_of
from transformers import AutoModelForCausalLM
from zoo import FAMILIES

from opsd_cli.engine.loading import add_adapter
from opsd_cli.insight.architectures import BUILDERS, shape_of
from opsd_cli.insight.model_lookup import find_model, read_headers, shape_of_weights, well_known
from opsd_cli.settings.errors import DataError, OutsideError

RANK = 4
REFUSED = {"gemma3", "mamba", "mamba2", "falcon_h1", "recurrent_gemma"}
STATED = {  # millions of weights, as the models' pages name them
    "Qwen/Qwen3-0.6B": 596, "Qwen/Qwen3-1.7B": 1721, "Qwen/Qwen3-4B": 4022, "Qwen/Qwen3-8B": 8191,
    "Qwen/Qwen3-14B": 14768, "Qwen/Qwen3-32B": 32762, "meta-llama/Llama-3.2-1B-Instruct": 1236,
    "meta-llama/Llama-3.2-3B-Instruct": 3213, "meta-llama/Llama-3.1-8B-Instruct": 8030,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 135, "HuggingFaceTB/SmolLM3-3B": 3075,
}  # fmt: skip


def saved_config(family: str, folder: Path) -> dict:
    FAMILIES[family].config().save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def on_meta(family: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(FAMILIES[family].config())


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED))
def test_weights_and_adapters_are_those_that_torch_and_peft_make(family: str, tmp_path: Path):
    shape, causal = shape_of(saved_config(family, tmp_path)), on_meta(family)
    assert shape.parameters == sum(p.numel() for p in causal.parameters())
    targets = FAMILIES[family].targets
    lora = replace(config_of("recipe=quickstart", "lora=r16").lora, rank=RANK, targets=targets)
    with torch.device("meta"):
        adapted = add_adapter(causal, lora, seed=0)
    assert shape.adapter(RANK, targets) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_is_not_known_is_refused_by_its_config_and_counted_from_its_files(family: str, tmp_path: Path):
    config = saved_config(family, tmp_path)
    with pytest.raises(DataError, match="is not known to opsd plan"):
        find_model(str(tmp_path))
    FAMILIES[family].make(tmp_path)
    found = find_model(str(tmp_path))
    assert found.shape.parameters == sum(p.numel() for p in on_meta(family).parameters())
    assert not found.shape.known
    assert config["model_type"] == found.shape.kind


def test_every_architecture_that_is_known_is_one_of_the_zoo():
    assert set(BUILDERS) <= {family.kind for family in FAMILIES.values()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_headers_count_the_weights_that_the_config_does(family: str, tmp_path: Path):
    FAMILIES[family].make(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.setdefault("hidden_size", config.get("n_embd"))
    by_files, by_config = shape_of_weights(read_headers(tmp_path), config), shape_of(config)
    assert by_files.parameters == by_config.parameters
    assert by_files.adapter(RANK) == by_config.adapter(RANK)


def test_the_table_of_well_known_models_gives_the_sizes_that_their_pages_name():
    assert {name: round(shape_of(config).parameters / 1e6) for name, config in well_known().items()} == STATED


def test_bundled_and_cached_models_are_found_and_a_folder_without_a_config_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert find_model("bundled:tiny").shape.parameters == 918_912
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    saved_config("llama", snapshot)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    found = find_model("someone/model")
    assert (found.shape.parameters, "cache" in found.source) == (31_968, True)
    with pytest.raises(DataError, match=r"there is no config\.json"):
        find_model(str(tmp_path))


def test_a_model_that_is_nowhere_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OutsideError, match=r"config\.json of model nobody/none: HF_HUB_OFFLINE is set"):
        find_model("nobody/none")
    with pytest.raises(DataError, match="neither a folder nor a hub id"):
        find_model("a model")


NO_LAYERS = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 100,
    "num_hidden_layers": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "llama"}, "has no '"),
        ({"model_type": "llama", "num_attention_heads": "four"}, "has "),
        ({"model_type": "phi", "qk_layernorm": True}, "with qk_layernorm=True"),
        ({}, "'unnamed'"),
        (NO_LAYERS, "describes a model without layers or weights"),
        ({**NO_LAYERS, "num_hidden_layers": 2, "vocab_size": "100"}, "a value of the wrong kind"),
    ],
)
def test_a_config_that_says_too_little_is_refused(config: dict, problem: str):
    with pytest.raises(DataError, match=problem):
        shape_of(config)


def test_a_damaged_file_is_not_counted(tmp_path: Path):
    saved_config("mamba", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        find_model(str(tmp_path))
