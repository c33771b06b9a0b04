"""`model/` is what was trained, and so is what is read from a checkpoint without DeepSpeed: whole and adapted weights,
tied and untied heads, sharded or not."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_ranks import PROBE, VARIANTS
from gradient_ranks import make_model, source_of
from peft import PeftModel
from resume_ranks import Attack, seal
from safetensors.torch import load_file
from support import TESTS, run_ranks
from transformers import AutoModelForCausalLM

from opsd_cli.engine.saved_weights import find_checkpoint, load_saved, read_weights
from opsd_cli.settings.config import LoraSettings
from opsd_cli.settings.errors import ConfigError, DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    for tied in (True, False):
        make_model(root / ("tied" if tied else "untied"), tied=tied)
    run_ranks([TESTS / "export_ranks.py", root], 2)
    return root


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROBE])).logits


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_exported_model_answers_like_the_trained_one(root: Path, variant):
    folder = root / variant.name
    exported = AutoModelForCausalLM.from_pretrained(folder)
    trained, exact = torch.load(root / f"{variant.name}.pt").float(), {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(
        logits(exported).float(), trained, **({"rtol": 0.1, "atol": 0.1} if variant.half else exact)
    )
    if variant.half:
        return  # what bfloat16 rounds is compared bit by bit below
    assert exported.config.tie_word_embeddings == variant.tied
    base = AutoModelForCausalLM.from_pretrained(root / ("tied" if variant.tied else "untied"))
    assert not torch.allclose(logits(base), logits(exported), atol=1e-3)
    if variant.lora:
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
        torch.testing.assert_close(logits(adapted), logits(exported), rtol=1e-4, atol=1e-5)


def checkpoint_of(root: Path, name: str) -> Path:
    return find_checkpoint(root / f"{name}_run" / "checkpoints", "last")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_checkpoint_read_without_deepspeed_is_the_exported_model_bit_for_bit(root: Path, variant):
    weights, exported = read_weights(checkpoint_of(root, variant.name)), root / variant.name
    if variant.lora:
        held = load_file(exported / "adapter" / "adapter_model.safetensors")
        weights = {name.replace(".default.weight", ".weight"): tensor for name, tensor in weights.items()}
    else:
        held = load_file(exported / "model.safetensors")
    weights.pop("lm_head.weight", None) if variant.tied else None
    assert weights.keys() == held.keys()
    assert all(torch.equal(weights[name], held[name]) for name in held)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16 if variant.half else torch.float32}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_model_loaded_from_a_checkpoint_answers_like_the_trained_one(root: Path, variant):
    source = replace(source_of(root, variant), dtype=torch.bfloat16 if variant.half else torch.float32)
    lora = LoraSettings(rank=4 if variant.lora else 0, alpha=8, dropout=0.0, targets=("q_proj", "up_proj"))
    model = load_saved(source, lora, checkpoint_of(root, variant.name))
    assert torch.equal(logits(model.lm), torch.load(root / f"{variant.name}.pt"))


@pytest.mark.parametrize("name", ["whole_half_2", "whole_half_offloaded_3", "lora_half_3", "whole_tied_0"])
def test_the_optimizers_own_weights_are_in_float32_and_round_to_those_that_were_trained(root: Path, name):
    weights, masters = read_weights(checkpoint_of(root, name)), read_weights(checkpoint_of(root, name), masters=True)
    assert weights.keys() == masters.keys()
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert all(torch.equal(masters[key].to(weights[key].dtype), weights[key]) for key in weights)
    half = "half" in name
    assert half == any(not torch.equal(masters[key], weights[key].float()) for key in weights)


def test_reading_a_checkpoint_imports_no_deepspeed(root: Path):
    code = (
        "import sys; from pathlib import Path; from opsd_cli.engine.saved_weights import read_weights\n"
        f"print(len(read_weights(Path({str(checkpoint_of(root, 'whole_tied_3'))!r}))), 'deepspeed' in sys.modules)"
    )
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read.stdout.split()[1] == "False"


def test_a_checkpoint_that_is_damaged_or_of_another_model_or_would_run_code_is_refused(root: Path, tmp_path: Path):
    checkpoint = tmp_path / "checkpoints" / "step_000002"
    shutil.copytree(checkpoint_of(root, "whole_tied_2"), checkpoint)
    other = source_of(root, VARIANTS[3])
    none = LoraSettings(rank=0, alpha=8, dropout=0.0, targets=("q_proj",))
    with pytest.raises(DataError, match=r"does not hold the weights of this model \(lm_head.weight"):
        load_saved(other, none, checkpoint)
    adapted = replace(none, rank=4)
    with pytest.raises(DataError, match=r"does not hold the weights of this model \(.*lora_A"):
        load_saved(other, adapted, checkpoint)
    (shard,) = checkpoint.rglob("weights_00001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"is damaged: \d+ bytes, expected \d+; choose another checkpoint"):
        read_weights(checkpoint)
    torch.save({"extra": Attack(tmp_path / "canary")}, shard, pickle_module=pickle)
    seal(checkpoint)
    with pytest.raises(DataError, match=r"weights_00001.safetensors holds no pieces of tensors"):
        read_weights(checkpoint)
    assert not (tmp_path / "canary").exists()


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(root: Path, tmp_path: Path):
    checkpoints = root / "whole_tied_2_run" / "checkpoints"
    assert find_checkpoint(checkpoints, 2) == find_checkpoint(checkpoints, "last")
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7; its checkpoints are of steps 2"):
        find_checkpoint(checkpoints, 7)
    with pytest.raises(ConfigError, match=r"has no best checkpoint: .*\(eval.every\); its checkpoints are of steps 2"):
        find_checkpoint(checkpoints, "best")
    with pytest.raises(ConfigError, match=r"has no checkpoint: one is written every checkpoint.every steps"):
        find_checkpoint(tmp_path / "checkpoints", "last")


def test_only_safetensors_and_configuration_are_written(root: Path):
    endings = {file.suffix for file in (root / VARIANTS[0].name).rglob("*") if file.is_file()}
    assert endings <= {".safetensors", ".json", ".jinja", ".txt", ".model", ".md"}
