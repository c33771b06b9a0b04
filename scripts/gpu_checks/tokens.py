"""Milliseconds of a token while a batch is drawn, at the shapes of real models with random weights, beside generate of
transformers: a figure above its aim fails. Runs alone on the card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM, Olmo2Config, PreTrainedConfig, PreTrainedModel

from gpu_checks import build
from gpu_checks.check import Bench, Check, Figure, Found
from gpu_checks.timed_tokens import PROMPT, QWEN3_1_7B, SMOLLM2_135M, time_generate, time_tokens
from opsd_cli.sampling.batch_decoder import HostLoop, TokenLoop
from opsd_cli.sampling.device_loop import DeviceLoop
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.sampling.static_decoder import StaticDecoder
from opsd_cli.settings.config import SamplingSettings

TOKENS = 128
OLMO2_1B = Olmo2Config(  # which the fast pass does not know
    vocab_size=100352, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=4096,
)  # fmt: skip


def captured(lm: PreTrainedModel) -> TokenLoop:
    return DeviceLoop(PagedDecoder(lm))


def held(lm: PreTrainedModel) -> TokenLoop:
    return HostLoop(StaticDecoder(lm, pad_id=build.PAD_ID, graphs=True))


@dataclass(frozen=True)
class Work:
    """A model's shape, rows, and what a token may take at most on an H100, in milliseconds (none: information)."""

    name: str
    config: PreTrainedConfig
    rows: int
    aim: float | None
    sampling: SamplingSettings
    against: float = 0.0  # times the speed of generate that is aimed at; 0: not measured
    loop: Callable[[PreTrainedModel], TokenLoop] = captured


def works() -> tuple[Work, ...]:
    plain, cut = (
        SamplingSettings(max_completion_tokens=0, temperature=1.0, top_p=top_p, top_k=top_k)
        for top_p, top_k in ((1.0, 0), (0.95, 20))
    )
    return (
        Work("SmolLM2-135M, 32 rows", SMOLLM2_135M, 32, 2.5, plain, against=5.0),
        Work("Qwen3-1.7B, 64 rows", QWEN3_1_7B, 64, 4.0, plain, against=5.0),
        Work("Qwen3-1.7B, 64 rows, top-k and top-p", QWEN3_1_7B, 64, 4.5, cut),
        Work("OLMo-2-1B, 64 rows, its own forward", OLMO2_1B, 64, None, plain, against=1.0, loop=held),
    )


def checks(bench: Bench) -> list[Check]:
    why = "needs a card: a CPU captures nothing"
    return [Check(work.name, partial(speed, bench, work), why) for work in works()]


def speed(bench: Bench, work: Work) -> Found:
    torch.manual_seed(0)
    with bench.device:
        lm = AutoModelForCausalLM.from_config(work.config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    prompts = torch.randint(2, work.config.vocab_size, (work.rows, PROMPT)).tolist()
    ms = time_tokens(work.loop(lm.requires_grad_(False)), prompts, work.sampling, TOKENS).token
    figures = [Figure("a token", ms, work.aim, unit="ms"), Figure("tokens/s", 1000 * work.rows / ms)]
    if work.against:
        theirs = time_generate(lm, prompts, 24)
        figures += [
            Figure("generate", theirs, unit="ms"), Figure("times as fast", theirs / ms, work.against, at_least=True)
        ]  # fmt: skip
    return Found(tuple(figures), f"bf16, prompts of {PROMPT}, random weights")
