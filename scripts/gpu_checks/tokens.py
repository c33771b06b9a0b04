"""Milliseconds of a token while a batch is drawn, at the shapes of real models with random weights, beside generate of
transformers: a figure above its aim fails. Runs alone on the card."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from gpu_checks import build
from gpu_checks.check import Bench, Check, Figure, Found
from opsd_cli.sampling.batch_decoder import BatchLimits, Request
from opsd_cli.sampling.device_loop import DeviceLoop
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import SamplingSettings

PROMPT, FIRST, TOKENS = 400, 8, 128  # the first are not counted: they compile and capture


@dataclass(frozen=True)
class Work:
    """A model's shape, rows, and what a token may take at most on an H100, in milliseconds."""

    name: str
    config: PreTrainedConfig
    rows: int
    aim: float
    sampling: SamplingSettings
    against: float = 0.0  # times the speed of generate that is aimed at; 0: not measured


def works() -> tuple[Work, ...]:
    plain, cut = (
        SamplingSettings(max_completion_tokens=FIRST + 2 * TOKENS, temperature=1.0, top_p=top_p, top_k=top_k)
        for top_p, top_k in ((1.0, 0), (0.95, 20))
    )
    smol = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    qwen = build.qwen3(hidden=2048, layers=28, heads=16, kv_heads=8, head_size=128, vocabulary=151_936)
    return (
        Work("SmolLM2-135M, 32 rows", smol, 32, 2.5, plain, against=5.0),
        Work("Qwen3-1.7B, 64 rows", qwen, 64, 4.0, plain, against=5.0),
        Work("Qwen3-1.7B, 64 rows, top-k and top-p", qwen, 64, 4.5, cut),
    )


def checks(bench: Bench) -> list[Check]:
    why = "needs a card: a CPU captures nothing"
    return [Check(work.name, partial(speed, bench, work), why) for work in works()]


@torch.inference_mode()
def speed(bench: Bench, work: Work) -> Found:
    torch.manual_seed(0)
    with bench.device:
        lm = AutoModelForCausalLM.from_config(work.config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    prompts = torch.randint(2, work.config.vocab_size, (work.rows, PROMPT)).tolist()
    loop = DeviceLoop(PagedDecoder(lm))
    draws = [Draw(prompt, seed) for seed, prompt in enumerate(prompts)]
    loop.open(Request(draws, work.sampling, frozenset([-1]), BatchLimits(work.rows, 131072)))
    loop.advance({i: i for i in range(work.rows)})
    advance(loop, FIRST)
    ms = 1000 * seconds_of(partial(advance, loop, TOKENS)) / TOKENS
    figures = [Figure("a token", ms, work.aim, unit="ms"), Figure("tokens/s", 1000 * work.rows / ms)]
    if work.against:
        few, more = (seconds_of(partial(generate, lm, prompts, tokens)) for tokens in (2, 26))
        theirs = 1000 * (more - few) / 24
        figures += [
            Figure("generate", theirs, unit="ms"), Figure("times as fast", theirs / ms, work.against, at_least=True)
        ]  # fmt: skip
    return Found(tuple(figures), f"bf16, prompts of {PROMPT}, random weights")


def advance(loop: DeviceLoop, tokens: int) -> None:
    for _ in range(tokens):
        loop.advance({})
        loop.ended()


def generate(lm: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    ids = torch.tensor(prompts, device=lm.device)
    how = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)


def seconds_of(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
