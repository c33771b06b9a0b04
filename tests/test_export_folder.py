"""An exported folder is the one that the run started from, with new weights: everything else comes along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_process import OneProcessEngine, one_rank
from recipe_support import config_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from zoo import FAMILIES
from zoo_run import WORDS, config_for

from opsd_cli.engine import export
from opsd_cli.engine.export import Exporter
from opsd_cli.engine.loading import find_source
from opsd_cli.settings.errors import DataError

SAMPLING = {"eos_token_id": [1, 7], "do_sample": False, "temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> OneProcessEngine:
    folder = tmp_path_factory.mktemp("origin") / "model"
    FAMILIES["deepseek_v3"].make(folder)  # its router has a stored buffer
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (folder / "LICENSE").write_text("free")
    (folder / "original").mkdir()
    (folder / "original" / "weights.pth").write_text("weights of another form")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("of the run that made this model")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("")
    config = config_for("deepseek_v3", folder, config_of(*WORDS), rank=0)
    source = find_source(config.model, dtype=torch.float32)
    return OneProcessEngine(config, source, torch.device("cpu"))


def exporter(engine: OneProcessEngine, *, own_template: bool = False) -> Exporter:
    tokenizer = AutoTokenizer.from_pretrained(engine.source.path)
    if own_template:
        tokenizer.chat_template = "my own"
    return Exporter(engine.source, tokenizer, export_dtype="auto", own_template=own_template)


def test_all_that_is_not_weights_comes_along(engine: OneProcessEngine, tmp_path: Path):
    exporter(engine).export(engine, tmp_path / "model")
    made, origin = tmp_path / "model", Path(engine.source.path)
    assert json.loads((made / "generation_config.json").read_text()) == SAMPLING
    assert GenerationConfig.from_pretrained(made).eos_token_id == [1, 7]
    for name in ("additional_chat_templates/tools.jinja", "LICENSE", "chat_template.jinja", "tokenizer.json"):
        assert (made / name).read_bytes() == (origin / name).read_bytes()
    assert not (made / "original").exists()
    assert not (made / "adapter").exists()
    assert not (made / ".cache").exists()
    config = json.loads((made / "config.json").read_text())
    assert config == json.loads((origin / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(made)


def test_a_chat_template_of_ones_own_is_what_is_exported(engine: OneProcessEngine, tmp_path: Path):
    exporter(engine, own_template=True).export(engine, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == "my own"


def test_a_folder_that_does_not_give_the_trained_weights_is_not_published(engine, tmp_path: Path, monkeypatch):
    """As if transformers had written something else than it was given."""
    real = export.check_written

    def spoil(causal, folder, source) -> None:
        causal.get_parameter("model.layers.0.self_attn.o_proj.weight").data += 1
        real(causal, folder, source)

    monkeypatch.setattr(export, "check_written", spoil)
    with pytest.raises(DataError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight is not what was trained"):
        exporter(engine).export(engine, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_done_without(engine: OneProcessEngine, tmp_path: Path):
    folder = tmp_path / "origin"
    shutil.copytree(engine.source.path, folder)
    moved = replace(exporter(engine), source=replace(engine.source, path=str(folder)))
    shutil.rmtree(folder)
    moved.export(engine, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").exists()
