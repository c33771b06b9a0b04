"""What a user can get wrong about a model is one line, before anything is trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from zoo import FAMILIES

from opsd_cli.data.chat import ChatFormat
from opsd_cli.engine.loading import Source, load_causal, load_tokenizer, resolve
from opsd_cli.settings.errors import ConfigError, DataError

TINY = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)
SMALL = Qwen3Config(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, max_position_embeddings=64, eos_token_id=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    Qwen3ForCausalLM(SMALL).save_pretrained(folder)
    shutil.copy(Path(TINY.path) / "tokenizer.json", folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    path, _, cached_only = resolve(str(folder), None, key="model.path")
    source = Source(path, None, torch.float32, "sdpa", False, cached_only)
    load_tokenizer(source)
    return load_causal(source)


def with_config(**settings):
    def edit(folder: Path) -> None:
        held = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(held | settings))

    return edit


def with_weights(change):
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return edit


def cut(name: str):
    def edit(folder: Path) -> None:
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(held[: len(held) // 2])

    return edit


def pointer(name: str):
    def edit(folder: Path) -> None:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    return edit


def only_an_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-1.7B"}')


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def one_of_two_files(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def deeper(weights):
    return weights | {name.replace("layers.1.", "layers.2."): w.clone() for name, w in weights.items()}


HEAD = "model.embed_tokens.weight"
BROKEN = {
    "a weight is missing": (
        with_weights(lambda w: {k: v for k, v in w.items() if "layers.1.mlp.down" not in k}),
        r"missing in the files: model\.layers\.1\.mlp\.down_proj\.weight\. What",
    ),
    "weights have other names": (
        with_weights(lambda w: {k.replace("up_proj", "up"): v for k, v in w.items()}),
        r"missing in the files: model\.layers\.0\.mlp\.up_proj\.weight, .*without a place in the model: .*mlp\.up\.",
    ),
    "the head is missing": (with_config(tie_word_embeddings=False), r"missing in the files: lm_head\.weight"),
    "the head is tied but differs": (
        with_weights(lambda w: w | {"lm_head.weight": 2 * w[HEAD]}),
        "tie_word_embeddings is true, but the files hold an output head that differs",
    ),
    "the table has another size": (
        with_config(vocab_size=80),
        r"of another size: model\.embed_tokens\.weight \(64x16 in the files, 80x16 in the model\)",
    ),
    "there are biases that the config denies": (
        with_weights(lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}),
        r"without a place in the model: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "there are more layers than the config says": (
        with_weights(deeper),
        r"without a place in the model: model\.layers\.2\..* and 8 more",
    ),
    "it is quantised": (
        with_config(quantization_config={"quant_method": "fp8"}),
        r"quantised weights \(quant_method fp8",
    ),
    "it is quantised by a package": (
        with_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "which cannot be trained; use the checkpoint that it was made from",
    ),
    "it is an adapter": (only_an_adapter, r"holds an adapter and no model; merge it into Qwen/Qwen3-1\.7B first"),
    "the weights were not fetched": (pointer("model.safetensors"), "is a pointer of Git LFS.*run `git lfs pull` in"),
    "the tokenizer was not fetched": (pointer("tokenizer.json"), "tokenizer.json is a pointer of Git LFS"),
    "the weights are cut": (cut("model.safetensors"), "model.safetensors is cut short or damaged"),
    "the tokenizer is cut": (cut("tokenizer.json"), "tokenizer.json is cut short or damaged"),
    "the config is cut": (cut("config.json"), "config.json is cut short or damaged"),
    "there is no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "the weights are pickled": (pickled, r"no weights as \.safetensors; those as \.bin or \.pt are pickles"),
    "a file of weights is missing": (one_of_two_files, r"of which 1 are missing: model-2\.safetensors; fetch"),
    "a number is text": (
        with_config(num_hidden_layers="2"),
        "cannot be loaded: .*'num_hidden_layers' expected int, got str",
    ),
    "a number is zero": (with_config(num_attention_heads=0), "ZeroDivisionError.*config.json may be wrong"),
    "an activation does not exist": (with_config(hidden_act="swoosh"), "KeyError: 'swoosh'; a setting in its config"),
    "the architecture does not exist": (with_config(model_type="nope"), "model type `nope`"),
}  # fmt: skip


def test_a_whole_model_is_loaded(whole: Path):
    assert load(whole).config.num_hidden_layers == 2


@pytest.mark.parametrize("what", BROKEN)
def test_a_model_that_is_not_whole_is_told_as_what_it_is(what: str, whole: Path, tmp_path: Path):
    edit, message = BROKEN[what]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    edit(folder)
    with pytest.raises(DataError, match=message) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)
    assert "pip install" not in str(refusal.value)


def test_tensors_of_parts_that_a_model_does_not_have_do_no_harm(whole: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    with_weights(lambda weights: weights | {"visual.patch.weight": torch.ones(2)})(folder)
    load(folder)


def test_a_chat_template_of_ones_own_is_read_from_a_file(tmp_path: Path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert load_tokenizer(TINY, chat_template=str(file)).chat_template == "{{ messages[0]['content'] }}"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"model\.chat_template is .*own\.jinja.*, which cannot be read as text: "):
        load_tokenizer(TINY, chat_template=str(file))
    with pytest.raises(ConfigError, match="but there is no such file"):
        load_tokenizer(TINY, chat_template=str(tmp_path / "none.jinja"))


def test_a_bundled_name_that_does_not_exist_is_told_those_that_do():
    with pytest.raises(ConfigError, match=r"not bundled; available: bundled:tiny, bundled:tiny_teacher"):
        resolve("bundled:huge", None, key="model.path")


def test_dropout_of_a_models_own_config_is_off_unless_it_is_asked_for(tmp_path: Path):
    """`gpt2` drops a tenth of its states in training."""
    FAMILIES["gpt2"].make(tmp_path / "gpt2")
    source = replace(TINY, path=str(tmp_path / "gpt2"))
    ids = torch.arange(20)[None]
    for dropout in (False, True):
        causal = load_causal(replace(source, dropout=dropout))
        in_evaluation = causal(input_ids=ids).logits
        assert torch.equal(causal.train()(input_ids=ids).logits, in_evaluation) != dropout
        assert causal.config.resid_pdrop == 0.1  # what is exported is the model's own config


def test_of_several_chat_templates_the_default_is_used_or_one_is_asked_for():
    tokenizer = load_tokenizer(TINY)
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tools": "x"}
    chat = ChatFormat(tokenizer, system=None)
    chat.close()
    assert chat.template == own
    tokenizer.chat_template = {"rag": own, "tools": "x"}
    with pytest.raises(DataError, match=r"has several chat templates \(rag, tools\) and none named default"):
        ChatFormat(tokenizer, system=None)
