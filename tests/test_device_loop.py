"""The loop that draws on the device, without a graph: what it draws, that it needs the host for nothing, and what it
reads after an update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_device import CPU, DEVICE, PretendedDevice
from support import completer_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from opsd_cli.engine.loading import add_adapter
from opsd_cli.engine.process_group import Ranks
from opsd_cli.sampling.batch_decoder import BatchLimits, HostLoop, Request, TokenLoop, run_loop
from opsd_cli.sampling.choose_decoder import Completer, find_disagreement
from opsd_cli.sampling.device_loop import DeviceLoop, Tricks
from opsd_cli.sampling.graphs import SMALL_BUCKETS, bucket_of
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.settings.config import LoraSettings, SamplingSettings
from opsd_cli.settings.errors import GuardError

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
KNOWN = {
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
LORA = LoraSettings(rank=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj", "o_proj", "up_proj"))
GREEDY = SamplingSettings(max_completion_tokens=20, temperature=0.0, top_p=1.0, top_k=0)
WARM = replace(GREEDY, temperature=1.0)
CUT = replace(GREEDY, temperature=0.8, top_p=0.9, top_k=12)
END_IDS = (0, 1, 2)


def model(config: PreTrainedConfig = KNOWN["qwen3"], *, seed: int = 0) -> nn.Module:
    """Random weights far enough from zero that every part of the forward pass shows in the logits."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    change(made, 0.2)
    return made


@torch.no_grad()
def change(lm: nn.Module, factor: float, *, only: str = "") -> None:
    """What an optimizer does: parameters change in place."""
    for name, parameter in lm.named_parameters():
        if only in name:
            parameter += factor * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5


def draws(number: int) -> list[Draw]:
    """Prompts of 1 to 23 tokens, pairs of which are the same."""
    prompts = [[(5 * (i // 2) + 3 * j) % 61 for j in range(1 + (7 * (i // 2)) % 23)] for i in range(number)]
    return [Draw(prompt, seed) for seed, prompt in enumerate(prompts)]


def drawn(loop: TokenLoop, rows: Sequence[Draw], at_once: int, sampling: SamplingSettings, **how) -> list[Completion]:
    request = Request(rows, sampling, frozenset(END_IDS), BatchLimits(at_once, 10**6))
    return run_loop(loop, request, **{"should_stop": lambda: False, **how})


def agree(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [(a.ids, a.finish_reason) for a in found] == [(b.ids, b.finish_reason) for b in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_drawn_on_the_device_is_what_the_model_draws(name: str):
    lm = model(KNOWN[name])
    loop = DeviceLoop(PagedDecoder(lm))
    assert find_disagreement(lm, PagedDecoder(lm)) == ""
    for sampling in (GREEDY, WARM, CUT):
        expected = drawn(HostLoop(HFDecoder(lm, pad_id=0)), draws(14), 64, sampling)
        assert {done.finish_reason for done in expected} == {"stop", "length"} or sampling is GREEDY
        for at_once in (1, 3, 14):
            agree(drawn(loop, draws(14), at_once, sampling), expected)


@pytest.fixture(scope="module")
def pair() -> tuple[DeviceLoop, HostLoop]:
    lm = model()
    return DeviceLoop(PagedDecoder(lm)), HostLoop(LlamaDecoder(lm))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.sampled_from([edge + off for edge in SMALL_BUCKETS[:7] for off in (-1, 0, 1)][1:]),
    more=st.integers(0, 9), sampling=st.sampled_from([GREEDY, WARM, CUT]), late=st.booleans(),
)  # fmt: skip
def test_a_loop_draws_the_same_at_the_edges_of_every_bucket_with_and_without_refill(pair, rows, more, sampling, late):
    loop, expected = pair
    short = replace(sampling, max_completion_tokens=7)
    loop.tricks = Tricks(late_read=late)
    agree(drawn(loop, draws(rows + more), rows, short), drawn(expected, draws(rows + more), rows, short))


def test_buckets_hold_what_they_are_for():
    assert [bucket_of(rows) for rows in (1, 3, 8, 17, 32, 33, 128, 129, 192, 193)] == [
        1, 4, 8, 24, 32, 48, 128, 192, 192, 256,
    ]  # fmt: skip


@pytest.mark.parametrize("fused_bytes", [2**30, 0], ids=["fused", "apart"])
@pytest.mark.parametrize("lent", [True, False], ids=["the engine's own weights", "copies"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "an adapter"])
def test_after_an_update_the_new_weights_are_read_at_the_old_addresses(lora: bool, lent: bool, fused_bytes: int):
    lm = model()
    if lora:
        lm = add_adapter(lm, LORA, seed=0).eval()
    decoder = PagedDecoder(lm, lent=lent, fused_bytes=fused_bytes)
    loop, addresses, made = DeviceLoop(decoder), addresses_of(decoder), []
    for _ in range(3):
        assert decoder.weights.refresh(lm)
        assert addresses_of(decoder) == addresses
        made.append(drawn(loop, draws(6), 4, GREEDY))
        agree(made[-1], drawn(HostLoop(HFDecoder(lm, pad_id=0)), draws(6), 4, GREEDY))
        change(lm, 0.3, only="lora_" if lora else "")
    assert made[0] != made[1] != made[2]


def addresses_of(decoder: PagedDecoder) -> list[int]:
    from opsd_cli.sampling.live_weights import tensors_of

    return [tensor.data_ptr() for tensor in tensors_of(decoder.weights.model)]


def test_weights_that_have_moved_are_not_read_any_more():
    lm = model()
    decoder = PagedDecoder(lm)
    lm.model.layers[1].mlp.down_proj.weight.data = lm.model.layers[1].mlp.down_proj.weight.data.clone()
    assert not decoder.weights.refresh(lm)
    adapted = add_adapter(model(), LORA, seed=0).eval()
    decoder = PagedDecoder(adapted)
    with adapted.disable_adapter():
        assert not decoder.weights.refresh(adapted)
    assert decoder.weights.refresh(adapted)


def test_a_small_update_of_an_adapter_is_not_rounded_away_in_half_precision():
    """Merged into bfloat16 weights, an update a thousandth of them leaves most of them as they are."""
    lm = add_adapter(model().to(torch.bfloat16), LORA, seed=0).eval()
    loop = PagedDecoder(lm)
    before = [maps.up_Mr.clone() for layer in loop.layers for maps in (layer.query_key_value, layer.output)]
    change(lm, 1e-4, only="lora_B")
    assert loop.weights.refresh(lm)
    after = [maps.up_Mr for layer in loop.layers for maps in (layer.query_key_value, layer.output)]
    for old, new, layer in zip(before, after, [0, 0, 1, 1], strict=True):
        assert not torch.equal(old, new), layer


def test_a_request_to_stop_cuts_what_is_not_finished():
    asked = iter([False, False, True])
    lm = model()
    made = drawn(DeviceLoop(PagedDecoder(lm)), draws(2), 1, replace(WARM, max_completion_tokens=50),
                 should_stop=lambda: next(asked))  # fmt: skip
    assert sorted(len(done.ids) for done in made) in ([0, 1], [0, 2], [0, 3])
    assert len(made) == 2


def test_logits_that_are_not_numbers_end_the_call_with_a_reason():
    lm = model()
    lm.lm_head.weight.data[7] = torch.nan
    for sampling in (GREEDY, WARM, CUT):
        with pytest.raises(GuardError, match="logits are NaN or infinite"):
            drawn(DeviceLoop(PagedDecoder(lm)), draws(3), 3, sampling)


def test_a_cache_is_used_again_if_it_is_large_enough_and_replaced_if_not():
    decoder = PagedDecoder(model())
    loop = DeviceLoop(decoder)
    drawn(loop, draws(6), 4, WARM)
    generation = decoder.generation
    drawn(loop, draws(3), 3, GREEDY)
    assert decoder.generation == generation
    drawn(loop, draws(40), 40, WARM)
    assert decoder.generation > generation
    loop.free()
    assert decoder.cache is None
    agree(drawn(loop, draws(3), 3, GREEDY), drawn(HostLoop(LlamaDecoder(model())), draws(3), 3, GREEDY))


def test_where_memory_is_scarce_fewer_rows_run_at_once_and_the_cache_stays(monkeypatch: pytest.MonkeyPatch):
    decoder = PagedDecoder(model())
    loop = DeviceLoop(decoder)
    monkeypatch.setattr(decoder, "_pages_that_fit", lambda: 3)
    request = Request(draws(6), WARM, frozenset(END_IDS), BatchLimits(6, 10**6))
    assert loop.open(request) == 3
    generation = decoder.generation
    assert loop.open(request) == 3
    assert decoder.generation == generation
    agree(drawn(loop, draws(6), 6, WARM), drawn(HostLoop(LlamaDecoder(model())), draws(6), 6, WARM))


def test_the_old_cache_and_what_was_captured_are_gone_before_a_new_cache_is_sized(monkeypatch: pytest.MonkeyPatch):
    decoder, seen = PagedDecoder(model()), list[str]()
    decoder.forget_captured = lambda: seen.append("forgotten")
    monkeypatch.setattr(
        decoder, "_pages_that_fit", lambda: seen.append("sized, cache gone" if decoder.cache is None else "sized") or 99
    )
    decoder.rows_within(BatchLimits(2, 10**6), 10, 10, 2)
    seen.clear()
    decoder.rows_within(BatchLimits(6, 10**6), 10, 10, 6)
    assert seen == ["sized", "forgotten", "sized, cache gone"]


# What a token costs the host ------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts operations, except in what a graph would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.in_graph = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.in_graph:
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with PretendedDevice() as pretended:
        yield pretended


def on_the_device(lm: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that `module.to` keeps tied weights tied
    try:
        return lm.to(DEVICE)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_completer_keeps_its_loop_from_call_to_call_and_says_when_weights_have_moved(device: PretendedDevice):
    lm = on_the_device(model())
    said: list[str] = []
    completer = completer_of(lm, end_ids=END_IDS, warn=said.append)
    how = {"sampling": WARM, "limits": BatchLimits(4, 10**6), "should_stop": lambda: False}
    expected = drawn(HostLoop(LlamaDecoder(model())), draws(6), 4, WARM)
    agree(completer.complete(draws(6), **how), expected)
    first = completer.loop(lm)
    assert isinstance(first, DeviceLoop)
    agree(completer.complete(draws(6), **how), expected)
    assert completer.loop(lm) is first
    assert said == []
    lm.lm_head.weight.data = lm.lm_head.weight.data.clone()
    assert completer.loop(lm) is not first
    (message,) = said
    assert message.startswith("the weights are no longer where")
    agree(completer.complete(draws(6), **how), expected)


def test_a_token_launches_a_graph_and_one_copy_and_waits_for_nothing(device: PretendedDevice):
    loop = DeviceLoop(PagedDecoder(on_the_device(model())))
    request = Request(draws(5), replace(WARM, max_completion_tokens=40), frozenset([-1]), BatchLimits(5, 10**6))
    with torch.inference_mode():
        loop.open(request)
        loop.advance({i: i for i in range(5)})
        loop.ended()
        counting, run = Counting(), loop.graphs.run

        def uncounted(key, work):
            counting.in_graph = True
            run(key, work)
            counting.in_graph = False

        loop.graphs.run = uncounted
        device.waits.clear()
        with counting:
            for _ in range(10):
                loop.advance({})
                assert loop.ended() == []
        assert device.waits == []
        assert sum(counting.operations.values()) <= 10 * 5, counting.operations


@dataclass(frozen=True)
class Gathered:
    """Weights that the engine gathers anew for each call."""

    lm: nn.Module
    keeps_addresses: ClassVar[bool] = False

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        yield self.lm


def test_where_one_rank_has_no_room_for_what_a_graph_reads_no_rank_captures(device: PretendedDevice):
    """What this rank says is asked at every call, whatever it has kept, and the answer is that of all."""
    lm, asked = on_the_device(model()), list[str]()
    answers = ["", "", "no room (on rank 1 of 2)"]

    class Two(Ranks):
        """This rank and one that runs out of room."""

        def refusal(self, reason: str) -> str:
            asked.append(reason)
            return answers.pop(0)

    ranks = Two(CPU, nullcontext, rank=0, world_size=2)
    completer = Completer(Gathered(lm), ranks, end_ids=END_IDS, pad_id=0)
    completer._refusal = ""  # the fast pass is chosen
    kept = completer.loop(lm)
    assert isinstance(kept, DeviceLoop)
    assert completer.loop(lm) is kept
    crowded = completer.loop(lm)
    assert crowded is not kept
    assert crowded.tricks == Tricks(graphs=False)
    assert completer._why_uncaptured(lm) == "no room (on rank 1 of 2)", "it stays so, and nobody is asked any more"
    assert len(asked) == 3
