"""`model/` is what was trained: whole and adapted weights, tied and untied heads, sharded or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_ranks import PROBE, VARIANTS
from gradient_ranks import make_model
from peft import PeftModel
from support import TESTS, run_ranks
from transformers import AutoModelForCausalLM

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
    torch.testing.assert_close(logits(exported), torch.load(root / f"{variant.name}.pt"), rtol=1e-4, atol=1e-5)
    assert exported.config.tie_word_embeddings == variant.tied
    base = AutoModelForCausalLM.from_pretrained(root / ("tied" if variant.tied else "untied"))
    assert not torch.allclose(logits(base), logits(exported), atol=1e-3)
    if variant.lora:
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
        torch.testing.assert_close(logits(adapted), logits(exported), rtol=1e-4, atol=1e-5)


def test_only_safetensors_and_configuration_are_written(root: Path):
    endings = {file.suffix for file in (root / VARIANTS[0].name).rglob("*") if file.is_file()}
    assert endings <= {".safetensors", ".json", ".jinja", ".txt", ".model", ".md"}
