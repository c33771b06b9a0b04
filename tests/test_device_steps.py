"""Where tensors live, from a model to a whole step: both layouts, both decoders, copies of weights and every way a step
can go give, on a device that refuses to meet the CPU, what they give on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.config import get_timers_config
from one_process import OneProcessEngine, one_rank, parts_of
from pretend_device import DEVICE, PretendedDevice
from recipe_support import config_of
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opsd_cli.data.pairing import TokenBatch
from opsd_cli.data.shared_rows import SharedRows
from opsd_cli.engine.fingerprint import digest_of
from opsd_cli.engine.loading import Source, add_adapter
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import Ranks, alone
from opsd_cli.engine.weight_copies import UpdateCopy, own_shard
from opsd_cli.engine.zero_config import deepspeed_config, frozen_config
from opsd_cli.loss.divergences import CrossEntropy, ReverseKL
from opsd_cli.sampling import llama_decoder
from opsd_cli.sampling.batch_decoder import BatchLimits, Decoder, decode
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.sampling.samplers import DatasetSampler
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import ClipSettings, Config, LoraSettings, SamplingSettings, SupportSettings
from opsd_cli.teachers.teachers import Blend, Ema, External, Live, NoTeacher, Sync
from opsd_cli.testing import fault_points
from opsd_cli.training.loop import micro_batches, train_step

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "opsd_cli" / "assets" / "tiny"
LENGTHS = (9, 2, 14, 8)
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that `module.to` keeps tied weights tied
    with one_rank():
        yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with PretendedDevice() as pretended:
        yield pretended


def qwen(where: torch.device, *, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=97, head_dim=16, tie_word_embeddings=True, initializer_range=0.2, **SIZES)
    return Qwen3ForCausalLM(config).eval().to(where)


def hidden_and_gradient(where: torch.device, layout: str, device: PretendedDevice) -> tuple[Tensor, Tensor, list[str]]:
    """Of a batch, from the loaded model, and what was waited for on the way."""
    causal = qwen(where)
    found = usable_layout(causal, alone()).layout if layout == "packed" else "padded"
    policy = Policy(causal, layout=found)
    ids_L = torch.arange(sum(LENGTHS)) % 97
    batch = TokenBatch(ids_L, torch.tensor([3, 4, 12, 20, 26, 31]), LENGTHS).to(where)
    device.waits.clear()
    hidden_ND = policy(batch, lambda hidden_ND, head: (hidden_ND,))[0]
    hidden_ND.square().sum().backward()
    waits = list(device.waits)
    assert found == layout
    return hidden_ND.detach().cpu(), causal.model.embed_tokens.weight.grad.cpu(), waits


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_pass_over_a_batch_and_its_backward_are_those_of_the_cpu_and_wait_for_nothing(
    layout: str, device: PretendedDevice
):
    *there, waits = hidden_and_gradient(DEVICE, layout, device)
    *here, _ = hidden_and_gradient(CPU, layout, device)
    assert len(waits) == (layout == "padded"), waits  # transformers asks whether rows that it pads are packed
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def completions(decoder: Decoder, sampling: SamplingSettings) -> list[tuple[int, ...]]:
    prompts = [[(5 * i + 3 * j) % 97 for j in range(2 + (7 * i) % 11)] for i in range(10)]
    made = decode(
        decoder, [Draw(prompt, seed) for seed, prompt in enumerate([*prompts, prompts[0]])], sampling=sampling,
        end_ids=range(30), limits=BatchLimits(3, 10**6), should_stop=lambda: False,
    )  # fmt: skip
    return [done.ids for done in made]


DECODERS = {"lean": LlamaDecoder, "module": lambda lm: HFDecoder(lm, pad_id=0), "paged": PagedDecoder}


def calls_of_keep(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """What a decoder is told to keep, filled as it runs."""
    calls: list[Sequence[int]] = []
    keep = decoder.keep
    monkeypatch.setattr(decoder, "keep", lambda slots: (calls.append(slots), keep(slots)))
    return calls


@pytest.mark.parametrize("kind", ["lean", "module", "paged"])
def test_a_decoder_draws_what_it_draws_on_the_cpu(kind: str, device: PretendedDevice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_decoder, "FIRST_COLUMNS", 2)
    kept = []
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 12, 0.9)):
        sampling = SamplingSettings(max_completion_tokens=12, temperature=temperature, top_p=top_p, top_k=top_k)
        decoder = DECODERS[kind](qwen(DEVICE))
        kept.append(calls_of_keep(decoder, monkeypatch))
        assert completions(decoder, sampling) == completions(LlamaDecoder(qwen(CPU)), sampling)
        if isinstance(decoder, LlamaDecoder):
            assert decoder.columns > decoder.longest_prompt + 2, "the cache has grown"
    assert any(kept), "finished rows were taken out"


def test_an_average_of_updates_lies_where_the_shards_lie(device: PretendedDevice):
    """With ZeRO-3's parameters offloaded a shard is on the CPU, and what is gathered of the adapter on the device."""
    lora = LoraSettings(rank=2, alpha=4, dropout=0.0, targets=("q_proj",))
    lm = add_adapter(qwen(CPU), lora, seed=0)
    expected = {}
    for name, module in lm.named_modules():
        if name.endswith("q_proj"):
            base, up = module.base_layer.weight, module.lora_B["default"].weight
            nn.init.normal_(up)
            expected[f"{name}.update"] = 2.0 * (up @ module.lora_A["default"].weight).detach()
            base.ds_tensor = base.detach().flatten()
            module.lora_A.to(DEVICE)
            module.lora_B.to(DEVICE)
    copy = UpdateCopy(lm, lambda parameters: nullcontext())
    assert copy._copies.keys() == expected.keys()
    for name, held in copy._copies.items():
        torch.testing.assert_close(held, expected[name].flatten())


def test_a_shard_of_something_on_the_device_stays_there(device: PretendedDevice):
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.zeros(8, device=DEVICE)
    shard = own_shard(torch.arange(6.0).to(DEVICE), parameter)
    assert shard.device == DEVICE
    assert shard.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0]


def test_ranks_add_up_without_waiting_for_their_device(device: PretendedDevice):
    ranks = Ranks(DEVICE, nullcontext, rank=0, world_size=2)  # a group of one would be asked for nothing
    assert ranks.all_sum([1.0, 2.5]) == [1.0, 2.5]
    assert device.waits == []


def test_the_bytes_of_a_weight_are_the_same_wherever_it_lies(device: PretendedDevice):
    """One tensor at a time: what is pretended belongs to this thread, and a fingerprint is made in several."""
    weight = torch.randn(300, 7)
    assert digest_of("w", weight.to(DEVICE)) == digest_of("w", weight)


# Whole steps --------------------------------------------------------------------------------------------------------

ENGINES = ("all weights", "an adapter", "padded")
TAIL = SupportSettings(side="union", k=20, rest="tail")
OFF_POLICY = {"train.updates_per_step": 2, "loss.importance_cap": 2.0, "tokens.gate": "privilege"}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "the method as published": ("all weights", {}),
    "an average of the weights": ("all weights", {"teacher": Ema(rate=0.5), "divergence": ReverseKL()}),
    "an average of updates": ("an adapter", {"teacher": Ema(rate=0.5), "support": TAIL}),
    "a copy of the adapter": ("an adapter", {"teacher": Sync(every=1), "clip": ClipSettings(kind="token", limit=0.05)}),
    "a blend of two": ("an adapter", {"teacher": Blend(live=0.4), "target.kind": "barycentre", "target.weight": 0.5}),
    "another model": ("all weights", {"target.kind": "guided", "target.weight": 0.5, "target.other": "free"}),
    "off-policy updates": ("all weights", OFF_POLICY),
    "no teacher": ("all weights", {"teacher": NoTeacher(), "divergence": CrossEntropy(), "sampler": DatasetSampler()}),
    "rows in a rectangle": ("padded", {"teacher": Live(), "sampling.top_k": 20, "sampling.top_p": 0.9}),
    "out of memory": ("all weights", {"train.halve_on_oom": True}),
    "a loss that is not finite": ("all weights", {}),
}  # fmt: skip
FAULTS = {"out of memory": "oom@step.loss:2", "a loss that is not finite": "nonfinite@step.loss:2"}


@pytest.fixture(scope="module")
def config() -> Config:
    return config_of(
        "recipe=quickstart", "train.problems_per_step=3", "train.micro_batch_tokens=40", "loss.mask_truncated=false",
        "sampling.max_completion_tokens=4", "sampler.max_rows=2", "samples.every=1", "samples.count=1000",
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is run packed, another one with the same tokenizer, and one with windows, which is padded."""
    root = tmp_path_factory.mktemp("models")
    for name in ("packed", "other", "padded"):
        torch.manual_seed(len(name))
        with_windows = MistralConfig(vocab_size=97, sliding_window=8, **SIZES)
        causal = MistralForCausalLM(with_windows) if name == "padded" else qwen(CPU, seed=len(name))
        causal.save_pretrained(root / name)
        for file in TINY.glob("*token*"):
            shutil.copy(file, root / name)
    return root


@pytest.fixture(scope="module")
def engines(process, config: Config, models: Path) -> dict[tuple[str, torch.device], OneProcessEngine]:
    """Each of ENGINES on the CPU and on the device."""
    made = {}
    for name, where in product(ENGINES, (CPU, DEVICE)):
        folder = models / ("padded" if name == "padded" else "packed")
        source = Source(str(folder), None, torch.float32, "sdpa", False, True)
        adapted = name == "an adapter"
        own = changed(config, {"lora.rank": 4 * adapted, "train.gradient_checkpointing": adapted})
        with PretendedDevice() if where == DEVICE else nullcontext():
            made[name, where] = OneProcessEngine(own, source, where)
    assert made["padded", DEVICE].pads
    assert not made["all weights", DEVICE].pads
    return made


def changed(config: Config, values: dict[str, Any]) -> Config:
    """The config with other sections, or other values in them."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(vars(config)[section], **{name: value}) if name else value})
    return config


def taken(engine: OneProcessEngine, config: Config) -> tuple[list, list, dict[str, float], str]:
    """What a step reports: completions, what their tokens cost, metrics but times, why it was refused."""
    report = train_step(0, parts_of(engine, config), updates=0)
    ids = [sample.rollout.completion_ids for sample in report.samples]
    losses = [sample.token_losses for sample in report.samples]
    metrics = {
        n: v for n, v in report.metrics.items() if not n.startswith(("time/", "memory/", "compute/", "tokens/per_"))
    }
    return ids, losses, metrics, report.refused


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_the_device_is_the_step_on_the_cpu(name: str, engines, config: Config, models: Path, request):
    which, values = STEPS[name]
    if name == "another model":
        values = values | {"teacher": External(path=str(models / "other"), revision=None, placement="replicated")}
    request.addfinalizer(lambda: fault_points.arm({}))
    own = changed(config, values)
    found = []
    for where in (CPU, DEVICE):
        fault_points.arm({fault_points.VARIABLE: FAULTS.get(name, "")})
        with PretendedDevice() if where == DEVICE else nullcontext():
            found.append(taken(engines[which, where], own))
    (expected_ids, expected_losses, *expected), (ids, losses, *made) = found
    assert ids == expected_ids
    assert made[1] == expected[1] == ("loss" if "finite" in name else "")
    assert any(losses)
    for cost, expected_cost in zip(losses, expected_losses, strict=True):
        assert cost == pytest.approx(expected_cost, rel=1e-3, abs=1e-5, nan_ok=True)
    assert made[0] == pytest.approx(expected[0], rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", ENGINES)
def test_what_generates_lies_whole_on_the_device(name: str, engines):
    """Parameters that are lent and buffers that are shared: transformers moves a stray table without a word."""
    with PretendedDevice(), engines[name, DEVICE].generating() as lm:
        assert {tensor.device for tensor in (*lm.parameters(), *lm.buffers())} == {DEVICE}


def test_deepspeed_does_not_wait_for_the_device_to_tell_a_throughput(config: Config):
    trained = deepspeed_config(config.zero, config.optim, stage=2, dtype=torch.bfloat16)
    for made in (trained, frozen_config("sharded", dtype=torch.bfloat16)):
        assert not get_timers_config(made).enabled


def test_learning_waits_five_times_for_an_update_whatever_the_number_of_micro_batches(engines, config: Config):
    """Whether the losses are finite, the gradient's norm, how far the weights moved, the averages, what each token
    cost."""
    with PretendedDevice() as device:
        parts = parts_of(engines["all weights", DEVICE], changed(config, {"sampler": DatasetSampler()}))
        device.waits.clear()
        samples = train_step(0, parts, updates=0).samples
        assert set(device.waits) == {"read"}
        made, device.waits = len(device.waits), []
        drawn = [(s.rollout, [1.0] * len(s.rollout.completion_ids)) for s in samples]
        batches = micro_batches(SharedRows(drawn, alone(), parts.train_prompts.prompt_at), parts)
        assert len(batches) > 1
        assert made == 5
