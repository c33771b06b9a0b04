"""Frozen weights in 4 bits under LoRA: a step is that of the same weights unpacked, an export has the original ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from one_process import OneProcessEngine, one_rank, parts_of
from recipe_support import config_of
from transformers import AutoModelForCausalLM

from opsd_cli.engine.export import Exporter
from opsd_cli.engine.loading import Source, find_source, load_causal, load_tokenizer
from opsd_cli.engine.quantized import is_packed
from opsd_cli.engine.weight_copies import parameter_counts
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.training.loop import train_step

WORDS = (
    "recipe=quickstart", "lora=r16", "train.problems_per_step=3", "loss.mask_truncated=false", "samples.every=1",
    "samples.count=100", "sampling.max_completion_tokens=4", "train.micro_batch_tokens=150",
)  # fmt: skip
CPU = torch.device("cpu")
INSTALLED = find_spec("bitsandbytes") is not None
needs_it = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes, the extra quantize, is not installed")


@pytest.fixture(scope="module")
def process() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def config() -> Config:
    return config_of(*WORDS, "model.quantize=4bit")


@pytest.fixture(scope="module")
def packed(process, config: Config) -> OneProcessEngine:
    return OneProcessEngine(config, find_source(config.model, dtype=torch.float32), CPU)


def unpacked(folder: Path, source: Source) -> Source:
    """The same model with the numbers that its packed weights stand for."""
    from bitsandbytes.functional import dequantize_4bit

    causal = load_causal(Source(source.path, None, source.dtype, "sdpa", False, True))
    for name, parameter in load_causal(source).named_parameters():
        if is_packed(parameter):
            causal.get_parameter(name).data = dequantize_4bit(parameter.data, parameter.quant_state)
    causal.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return Source(str(folder), None, source.dtype, "sdpa", False, True)


@needs_it
@pytest.mark.slow
def test_steps_are_those_of_the_same_weights_unpacked(packed: OneProcessEngine, config: Config, tmp_path: Path):
    plain = OneProcessEngine(config_of(*WORDS), unpacked(tmp_path, packed.source), CPU)
    assert parameter_counts(packed.policy) == parameter_counts(plain.policy)
    found = []
    for engine in (packed, plain):
        parts, steps = parts_of(engine, config), []
        for step in range(2):  # the adapter is zero at first; drawing, without a gradient, comes before learning
            report = train_step(step, parts, updates=step)
            assert not report.refused
            metrics = {name: report.metrics[name] for name in ("loss/objective", "optim/grad_norm", "kl/reverse")}
            steps.append(([sample.rollout.completion_ids for sample in report.samples], metrics))
        found.append(steps)
    for (ids, metrics), (expected_ids, expected) in zip(*found, strict=True):
        assert ids == expected_ids
        assert metrics == pytest.approx(expected, rel=1e-3)
    assert found[0][1][1] != pytest.approx(found[0][0][1], rel=1e-3), "nothing was learnt"


@needs_it
@pytest.mark.slow
def test_an_export_merges_the_adapter_into_the_original_weights(packed: OneProcessEngine, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in packed.policy.lm.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tokenizer = load_tokenizer(packed.source)
    Exporter(packed.source, tokenizer, "auto", own_template=False).export(packed, tmp_path / "model")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not hasattr(made.config, "quantization_config")
    original = load_causal(Source(packed.source.path, None, torch.float32, "sdpa", False, True))
    with torch.no_grad():
        for name, module in packed.policy.lm.named_modules():
            if name.endswith("q_proj"):
                scale, up, down = module.scaling["default"], module.lora_B["default"], module.lora_A["default"]
                plain = name.removeprefix("base_model.model.") + ".weight"
                expected = original.get_parameter(plain) + scale * (up.weight @ down.weight)
                torch.testing.assert_close(made.get_parameter(plain), expected)
    torch.testing.assert_close(made.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").is_file()


@needs_it
@pytest.mark.slow
def test_what_is_frozen_takes_a_quarter_of_what_it_takes_in_half_precision(packed: OneProcessEngine):
    layers = [p for p in packed.policy.parameters() if is_packed(p)]
    counted = sum(p.numel() * p.element_size() for p in layers)
    whole = copy.copy(packed.source)
    half = load_causal(Source(whole.path, None, torch.bfloat16, "sdpa", False, True))
    expected = sum(p.numel() * p.element_size() for n, p in half.named_parameters() if "_proj" in n)
    assert counted * 4 == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("lora=none",), "an adapter must be trained: use lora=r16 (got lora.rank=0)"),
        (("lora=r16", "zero=stage3"), "cannot be sharded: use zero=stage2 (got zero.stage=3)"),
        (("lora=r16", "teacher=ema"), "teacher=ema averages whole weights"),
        (("lora=r16", "sampler=vllm"), "sampler=vllm is given whole weights"),
    ],
    ids=["all weights", "stage 3", "an average", "vLLM"],
)
def test_what_cannot_be_done_with_packed_weights_is_refused(words: tuple[str, ...], said: str):
    with pytest.raises(ConfigError) as caught:
        config_of("recipe=quickstart", "model.quantize=4bit", *words)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_a_missing_bitsandbytes_is_named_before_anything_is_loaded():
    with pytest.raises(
        ConfigError, match=r"needs bitsandbytes, which is not installed: pip install 'opsd-cli\[quantize\]'"
    ):
        config_of("recipe=quickstart", "model.quantize=4bit", "lora=r16")
