"""The fast forward pass: which models it runs, that it answers what they answer, and how its cache is bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deep_models import deep_model
from support import completer_of
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from opsd_cli.engine.loading import add_adapter
from opsd_cli.sampling import llama_decoder, llama_weights
from opsd_cli.sampling.batch_decoder import BatchLimits, decode
from opsd_cli.sampling.choose_decoder import find_disagreement
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.llama_weights import supports
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import LoraSettings, SamplingSettings

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
WARM = SamplingSettings(max_completion_tokens=30, temperature=1.0, top_p=1.0, top_k=0)
KNOWN = {
    "llama": LlamaConfig(**SIZES),
    "llama_bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama_3": LlamaConfig(**SIZES, rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}  # fmt: skip
UNKNOWN = {
    "mistral_windows": MistralConfig(**SIZES, sliding_window=8),
    "qwen2_windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
    "dynamic": LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
}


def model(config: PreTrainedConfig) -> torch.nn.Module:
    """Random weights far enough from zero that every part of the forward pass shows in the logits."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return made


def draws(number: int, *, repeats: int = 1) -> list[Draw]:
    lengths = [3 + (7 * i) % 23 for i in range(number)]
    prompts = [[(5 * i + 3 * j) % 97 for j in range(length)] for i, length in enumerate(lengths)]
    return [Draw(prompt, 10 * i + g) for i, prompt in enumerate(prompts) for g in range(repeats)]


def drawn(decoder, made: list[Draw], *, rows: int = 64, tokens: int = 10**6, sampling: SamplingSettings = WARM):
    return decode(
        decoder, made, sampling=sampling, end_ids=[0, 1, 2], limits=BatchLimits(rows, tokens), should_stop=lambda: False
    )


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_architecture_is_run_and_draws_what_the_model_draws(name: str):
    lm = model(KNOWN[name])
    assert supports(lm)
    assert find_disagreement(lm, LlamaDecoder(lm)) == ""
    expected = drawn(HFDecoder(lm, pad_id=0), draws(12))
    for made, right in zip(drawn(LlamaDecoder(lm), draws(12), rows=4), expected, strict=True):
        assert made.ids == right.ids
        assert made.logprobs == pytest.approx(right.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_architecture_is_left_to_its_own_forward(name: str):
    lm = model(UNKNOWN[name])
    assert not supports(lm)
    assert isinstance(completer_of(lm).loop(lm).decoder, HFDecoder)
    assert len(drawn(HFDecoder(lm, pad_id=0), draws(5, repeats=2), rows=4)) == 10


def test_a_model_that_answers_otherwise_is_left_to_its_own_forward():
    lm = model(KNOWN["qwen3"])
    lm.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    assert supports(lm)
    assert find_disagreement(lm, LlamaDecoder(lm)).startswith("the fast pass deviates from the model by")
    assert isinstance(completer_of(lm).loop(lm).decoder, HFDecoder)


class Wrong(LlamaDecoder):
    """The fast pass with one fault."""

    fault = ""

    def __init__(self, lm) -> None:
        super().__init__(lm)
        self.middle = self.layers[len(self.layers) // 2]
        if self.fault == "scale":
            self.scale *= 1.2
        if self.fault == "one layer's weights":
            wrong = replace(self.middle, output=self.middle.output.scale_input(torch.tensor(1.2, dtype=self.dtype)))
            self.layers = [wrong if layer is self.middle else layer for layer in self.layers]
        if self.fault == "one layer left out":
            self.layers = [self.layers[0] if layer is self.middle else layer for layer in self.layers]

    def _attention_input(self, x_ND, layer, cos_N1E, sin_N1E):
        turned = self.fault == "all rotations" or (self.fault == "one layer's rotation" and layer is self.middle)
        return super()._attention_input(x_ND, layer, cos_N1E, -sin_N1E if turned else sin_N1E)

    def step(self, token_b):
        if self.fault == "the position of a step":
            self.position_b.add_(1)
        return super().step(token_b)


FAULTS = (
    "scale", "all rotations", "one layer's rotation", "the position of a step", "one layer's weights",
    "one layer left out",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_fault_in_one_of_many_layers_is_seen_in_any_precision_and_rounding_is_none(
    kind: str, dtype: torch.dtype, monkeypatch
):
    lm = deep_model(kind, dtype)
    assert find_disagreement(lm, LlamaDecoder(lm)) == ""
    for fault in FAULTS:
        monkeypatch.setattr(Wrong, "fault", fault)
        assert find_disagreement(lm, Wrong(lm)).startswith("the fast pass deviates from the model"), fault


@pytest.mark.parametrize("fused_bytes", [2**30, 0], ids=["merged", "apart"])
def test_an_adapter_is_added_merged_or_apart(fused_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_weights, "FUSED_BYTES", fused_bytes)
    lm = add_adapter(model(KNOWN["qwen3"]), LoraSettings(rank=4, alpha=8, dropout=0.0, targets=("all-linear",)), seed=0)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    lm.eval()
    assert supports(lm)
    assert find_disagreement(lm, LlamaDecoder(lm)) == ""
    with lm.disable_adapter():
        assert find_disagreement(lm, LlamaDecoder(lm)) == ""


@pytest.mark.parametrize("first", [256, 4], ids=["whole", "grown"])
def test_columns_are_dropped_or_added_when_the_cache_is_used_up(first: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_decoder, "FIRST_COLUMNS", first)
    lm = model(KNOWN["qwen3"])
    made = draws(30)
    decoder = LlamaDecoder(lm)
    moved: list[int] = []
    make_room = decoder._make_room
    decoder._make_room = lambda: (moved.append(decoder.column), make_room())
    assert [done.ids for done in drawn(decoder, made, rows=3)] == [
        done.ids for done in drawn(HFDecoder(lm, pad_id=0), made)
    ]
    assert moved, "the test is too small"
    assert decoder.columns <= decoder.most_columns


def test_memory_follows_the_lengths_that_occur():
    lm = model(KNOWN["llama"])
    decoder = LlamaDecoder(lm)
    made = decode(
        decoder, draws(8), sampling=replace(WARM, max_completion_tokens=5000), end_ids=range(0, 97, 2),
        limits=BatchLimits(8, 10**6), should_stop=lambda: False,
    )  # fmt: skip
    assert max(len(done.ids) for done in made) < 200
    assert decoder.cache[0].shape[2] == decoder.columns < 300 < decoder.most_columns


@pytest.mark.parametrize(("tokens", "rows"), [(10**6, 8), (400, 5), (1, 1)])
def test_the_cache_is_bounded(tokens: int, rows: int):
    lm = model(KNOWN["llama"])
    decoder = LlamaDecoder(lm)
    assert decoder.rows_within(BatchLimits(8, tokens), 25, 30, 100) == rows
    held = decoder.cache[0].shape[0] * decoder.cache[0].shape[2]
    assert held <= tokens or rows == 1
    assert [done.ids for done in drawn(LlamaDecoder(lm), draws(9), tokens=tokens)] == [
        done.ids for done in drawn(LlamaDecoder(lm), draws(9))
    ]


def test_rollouts_of_one_problem_share_its_prefill(monkeypatch: pytest.MonkeyPatch):
    lm = model(KNOWN["llama"])
    made = draws(6, repeats=5)
    monkeypatch.setattr(llama_decoder, "PREFILL_TOKENS", 40)
    passed: list[int] = []
    decoder = LlamaDecoder(lm)
    prefill = decoder._prefill
    decoder._prefill = lambda prompts, *more: (passed.extend(map(len, prompts)), prefill(prompts, *more))
    shared = drawn(decoder, made)
    assert sorted(passed) == sorted({tuple(draw.prompt_ids): len(draw.prompt_ids) for draw in made}.values())
    assert [done.ids for done in shared] == [done.ids for done in drawn(HFDecoder(lm, pad_id=0), made, rows=1)]
    assert len({done.ids for done in shared}) > len(passed)


def test_the_check_is_repeated_as_weights_change_and_a_fallback_is_said():
    lm = model(KNOWN["qwen2"])
    said: list[str] = []
    completer = completer_of(lm, warn=said.append)
    assert completer.choose_decoder() == "drawn by the fast forward pass"
    kinds = [type(completer.loop(lm).decoder)]
    lm.model.norm.register_forward_hook(lambda module, args, output: output * 2)
    kinds += [type(completer.loop(lm).decoder) for _ in range(4)]
    assert kinds == [LlamaDecoder] * 3 + [HFDecoder] * 2
    (message,) = said
    assert message.startswith(
        "from here on completions are drawn by the model's own forward pass: the fast pass deviates"
    )


def test_bfloat16_is_run_and_agrees_within_its_precision():
    lm = model(KNOWN["qwen3"]).to(torch.bfloat16)
    assert find_disagreement(lm, LlamaDecoder(lm)) == ""
    made = drawn(LlamaDecoder(lm), draws(6), rows=2)
    assert all(len(done.ids) == len(done.logprobs) > 0 for done in made)


def test_copies_of_weights_keep_nothing_for_a_gradient():
    decoder = LlamaDecoder(model(KNOWN["qwen3"]))
    copies = [part.weights[0] for layer in decoder.layers for part in (layer.query_key_value, layer.gate_up)]
    assert all(copy.grad_fn is None for copy in copies)
