"""How long one token of a batch takes, ours and by generate of transformers, and the shapes at which that is asked:
what the checks `tokens` and `scripts/bench/decode_token.py` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, Qwen3Config

from opsd_cli.sampling.batch_decoder import BatchLimits, Request, TokenLoop
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import SamplingSettings

PROMPT, FIRST = 400, 8  # tokens; the first ones drawn do not count: they compile and capture
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_1_7B = Qwen3Config(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a token and of the prefill, and a way to run some tokens more."""

    token: float
    prefill: float
    more: Callable[[int], None]


@torch.inference_mode()
def time_tokens(loop: TokenLoop, prompts: Sequence[Sequence[int]], sampling: SamplingSettings, tokens: int) -> Timed:
    """Of one token, after the first ones; and of the prefill, which is timed the second time."""
    request = Request(
        [Draw(prompt, seed) for seed, prompt in enumerate(prompts)],
        replace(sampling, max_completion_tokens=FIRST + 2 * tokens), frozenset([-1]), BatchLimits(len(prompts), 131072),
    )  # fmt: skip
    everyone = {i: i for i in range(len(prompts))}
    for _ in range(2):
        assert loop.open(request) == len(prompts), "the cache is too small"
        prefill = seconds_of(lambda: loop.advance(everyone))
        loop.ended()
    advance(loop, FIRST)
    seconds = seconds_of(lambda: advance(loop, tokens))
    return Timed(1000 * seconds / tokens, 1000 * prefill, lambda more: advance(loop, more))


def advance(loop: TokenLoop, tokens: int) -> None:
    for _ in range(tokens):
        loop.advance({})
        loop.ended()


def time_generate(lm: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Milliseconds of one token: so many more than two, without the prefill."""

    def generate(count: int) -> None:
        how = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
        ids = torch.tensor(prompts, device=lm.device)
        lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)

    few, more = (seconds_of(lambda count=count: generate(count)) for count in (2, 2 + tokens))
    return 1000 * (more - few) / tokens


def seconds_of(run: Callable[[], object]) -> float:
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
