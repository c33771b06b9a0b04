"""A model's own forward over a cache that stays where it is: what it draws is what the model says, for architectures of
many kinds, and which of them cannot be held that way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretend_device import DEVICE, PretendedDevice
from support import completer_of
from torch import nn
from transformers import AutoModelForCausalLM
from zoo import FAMILIES

from opsd_cli.engine.loaded_weights import switch_off_dropout
from opsd_cli.engine.loading import add_adapter
from opsd_cli.sampling.batch_decoder import BatchLimits, HostLoop, Request, run_loop
from opsd_cli.sampling.decoder_trial import find_fault
from opsd_cli.sampling.static_decoder import StaticDecoder
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.settings.config import LoraSettings, SamplingSettings

GREEDY = SamplingSettings(max_completion_tokens=12, temperature=0.0, top_p=1.0, top_k=0)
HELD = ("llama3", "olmo2", "gemma", "gpt2", "gpt_neox", "phi", "starcoder2", "opt", "mpt", "mixtral", "deepseek_v3")
NOT_HELD = ("mistral", "gemma2", "mamba", "falcon_h1", "lfm2", "qwen3_5", "bloom")


def model(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = FAMILIES[family].config()
    if family == "starcoder2":
        config.sliding_window = None
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    switch_off_dropout(causal)
    change(causal, 0.1, seed=1)
    return causal


@torch.no_grad()
def change(causal: nn.Module, size: float, *, seed: int) -> None:
    """What an optimizer does: parameters change in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in causal.parameters():
        if parameter.dim() > 1:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def draws(count: int) -> list[Draw]:
    return [Draw([(7 * i + 3 * place) % 250 + 2 for place in range(1 + (5 * i) % 9)], seed=i) for i in range(count)]


def drawn(decoder: StaticDecoder, some: list[Draw], *, rows: int) -> list[Completion]:
    """A fifth of all tokens end a row, so that rows leave and others enter."""
    request = Request(some, GREEDY, frozenset(range(0, 257, 5)), BatchLimits(rows, 10**6))
    return run_loop(HostLoop(decoder), request, should_stop=lambda: False)


@torch.no_grad()
def assert_greedy(causal: nn.Module, some: list[Draw], made: list[Completion]) -> None:
    """Every token is the likeliest of the model's own forward over the whole row, within rounding."""
    for draw, done in zip(some, made, strict=True):
        ids = torch.tensor([[*draw.prompt_ids, *done.ids]])
        logits = causal(input_ids=ids, use_cache=False).logits[0, len(draw.prompt_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(done.ids).unsqueeze(1)).squeeze(1)
        assert (logits.max(1).values - chosen).max() < 1e-3


@pytest.mark.parametrize("family", HELD)
def test_greedy_tokens_are_the_models_own_before_and_after_an_update_while_rows_come_and_go(family: str):
    causal, some = model(family), draws(11)
    decoder = StaticDecoder(causal, pad_id=0, graphs=True)
    assert_greedy(causal, some, drawn(decoder, some, rows=4))
    change(causal, 0.05, seed=2)
    assert decoder.reads(causal)
    made = drawn(decoder, some, rows=3)
    assert_greedy(causal, some, made)
    assert len({len(done.ids) for done in made}) > 1


@pytest.mark.parametrize("family", ["olmo2", "gpt2", "mixtral"])
def test_it_passes_the_trial_of_decoders(family: str):
    causal = model(family)
    assert find_fault(causal, StaticDecoder(causal, pad_id=0, graphs=False)) == ""


@pytest.mark.parametrize("family", NOT_HELD)
def test_an_architecture_that_cannot_be_held_is_found_by_the_trial(family: str):
    causal = model(family)
    assert find_fault(causal, StaticDecoder(causal, pad_id=0, graphs=False)) != ""


def test_an_adapter_is_read_as_it_is():
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0, targets=("all-linear",))
    lm = add_adapter(model("olmo2"), lora, seed=0)
    decoder, some = StaticDecoder(lm, pad_id=0, graphs=False), draws(5)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    assert_greedy(lm, some, drawn(decoder, some, rows=5))


def test_weights_at_other_addresses_are_noticed():
    causal = model("olmo2")
    decoder = StaticDecoder(causal, pad_id=0, graphs=False)
    assert decoder.reads(causal)
    causal.lm_head.weight.data = causal.lm_head.weight.data.clone()
    assert not decoder.reads(causal)


def test_a_cache_is_used_again_where_it_is_large_enough():
    causal, some = model("olmo2"), draws(6)
    decoder = StaticDecoder(causal, pad_id=0, graphs=False)
    first = drawn(decoder, some, rows=4)
    kept = decoder.layers[0][0].data_ptr()
    assert drawn(decoder, some, rows=4) == first
    assert decoder.layers[0][0].data_ptr() == kept
    assert decoder.bytes > 0
    decoder.free()
    assert decoder.bytes == 0
    assert [done.ids for done in drawn(decoder, some, rows=6)] == [done.ids for done in first]


def on_the_device(lm: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that a pretended tensor may replace a parameter
    try:
        return lm.to(DEVICE)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with PretendedDevice() as pretended:
        yield pretended


def test_a_run_on_a_device_chooses_it_for_what_the_fast_pass_does_not_know(device: PretendedDevice):
    causal, some = on_the_device(model("olmo2")), draws(6)
    completer = completer_of(causal, end_ids=range(0, 257, 5))
    said = completer.choose_decoder()
    assert said.startswith("drawn by the model's own forward pass over a cache that stays where it is"), said
    made = completer.complete(some, sampling=GREEDY, limits=BatchLimits(4, 10**6), should_stop=lambda: False)
    assert_greedy(model("olmo2"), some, made)
    first = completer.loop(causal).decoder
    assert isinstance(first, StaticDecoder)
    assert completer.loop(causal).decoder is first


@torch.no_grad()
def test_a_token_waits_for_nothing(device: PretendedDevice):
    """So that it can be captured."""
    causal = on_the_device(model("olmo2"))
    decoder = StaticDecoder(causal, pad_id=0, graphs=False)
    decoder.rows_within(BatchLimits(4, 10**6), 9, 12, 4)
    decoder.admit([0, 1, 2], [list(draw.prompt_ids) for draw in draws(3)])
    token_b = torch.tensor([3, 4, 5]).to(DEVICE)
    device.waits.clear()
    decoder.step(token_b)
    assert device.waits == []
