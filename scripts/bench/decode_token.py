"""Benchmark: milliseconds of one token of a batch, with each trick of the decoder for GPUs left out, beside generate of
transformers; and which kernels the time goes to.

    python scripts/bench/decode_token.py           # a tiny shape on the CPU: that it runs, and its graph-free form
    python scripts/bench/decode_token.py --gpu     # the shapes of SmolLM2-135M and Qwen3-1.7B, random weights, bfloat16

Prompts of 400 tokens, 192 tokens after the first eight, so neither prefill nor capture are in a token's time. Owns the
cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from measure import arguments, report, start, synchronize, table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_checks.timed_tokens import PROMPT, QWEN3_1_7B, SMOLLM2_135M, time_generate, time_tokens

from opsd_cli.engine.loading import add_adapter
from opsd_cli.sampling.batch_decoder import HostLoop, TokenLoop
from opsd_cli.sampling.device_loop import DeviceLoop, Tricks
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.settings.config import LoraSettings, SamplingSettings

PLAIN = SamplingSettings(max_completion_tokens=0, temperature=1.0, top_p=1.0, top_k=0)
PROFILED = 16
SHAPES: dict[str, tuple[PreTrainedConfig, int]] = {"SmolLM2-135M": (SMOLLM2_135M, 32), "Qwen3-1.7B": (QWEN3_1_7B, 64)}
"""And rows."""
TINY = {"tiny": (LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
), 8)}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to draw: a loop around the model, and how it draws."""

    name: str
    loop: Callable[[torch.nn.Module], TokenLoop]
    sampling: SamplingSettings = PLAIN
    lora: bool = False
    slow: bool = False  # fewer tokens


def paged(tricks: Tricks, *, kernels: bool | None = None, fused_bytes: int | None = None):
    more = {} if fused_bytes is None else {"fused_bytes": fused_bytes}
    return lambda lm: DeviceLoop(PagedDecoder(lm, kernels=kernels, **more), tricks)


WAYS = [
    Way("all tricks", paged(Tricks())),
    Way("greedy", paged(Tricks()), replace(PLAIN, temperature=0.0)),
    Way("top_k 20, top_p 0.95", paged(Tricks()), replace(PLAIN, top_k=20, top_p=0.95)),
    Way("top_p 0.95", paged(Tricks()), replace(PLAIN, top_p=0.95)),
    Way("LoRA of rank 32", paged(Tricks()), lora=True),
    Way("LoRA of rank 32, no branches", paged(Tricks(branches=False)), lora=True),
    Way("no fused copies of weights", paged(Tricks(), fused_bytes=0)),
    Way("all weights fused", paged(Tricks(), fused_bytes=2**40)),
    Way("ids read at once", paged(Tricks(late_read=False))),
    Way("drawn by plain PyTorch", paged(Tricks(draw_kernel=False))),
    Way("attention by plain PyTorch", paged(Tricks(), kernels=False)),
    Way("no graphs", paged(Tricks(graphs=False)), slow=True),
    Way("the decoder for CPUs", lambda lm: HostLoop(LlamaDecoder(lm)), slow=True),
]


@torch.inference_mode()
def kernels_of(run: Callable[[], None], most: int = 16) -> list[list[object]]:
    """The kernels that take most of the time of a token: microseconds and number for each token."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        synchronize()
    events = [event for event in found.key_averages() if event.self_device_time_total > 0]
    rest = sum(event.self_device_time_total for event in events)
    rows = [["all", rest / PROFILED, sum(event.count for event in events) / PROFILED]]
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:most]:
        rows.append([event.key[:90], event.self_device_time_total / PROFILED, event.count / PROFILED])
    return rows


def measured(name: str, options: argparse.Namespace, device: torch.device) -> list[list[object]]:
    """A row of each way."""
    config, rows = shapes_of(options)[name]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.gpu else torch.float32
    with device:
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    prompt, tokens = (20, 16) if name in TINY else (PROMPT, 192)
    prompts = torch.randint(1, config.vocab_size, (rows, prompt)).tolist()
    table_rows: list[list[object]] = []
    for way in WAYS:
        if options.only and not any(way.name.startswith(word) for word in options.only):
            continue
        model = with_adapter(config, dtype, device) if way.lora else lm
        loop = way.loop(model)
        timed = time_tokens(loop, prompts, way.sampling, max(1, tokens // 6) if way.slow else tokens)
        table_rows.append([name, rows, way.name, timed.token, 1000 * rows / timed.token, timed.prefill])
        print(f"# {name}, {rows} rows, {way.name}: {timed.token:.3f} ms a token", flush=True)
        if device.type == "cuda" and (options.profile or way is WAYS[0]):
            more = partial(timed.more, PROFILED)
            table(["kernel", "microseconds a token", "launches a token"], kernels_of(more))
        del loop, model, timed
    if not options.only or "generate" in options.only:
        ms = time_generate(lm, prompts, max(1, tokens // 6))
        table_rows.append([name, rows, "generate", ms, 1000 * rows / ms, ""])
    return table_rows


def shapes_of(options: argparse.Namespace) -> dict[str, tuple[PreTrainedConfig, int]]:
    return SHAPES if options.gpu and not options.small else TINY


def with_adapter(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    lora = LoraSettings(rank=32, alpha=64, dropout=0.0, targets=("all-linear",))
    with device:
        causal = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return add_adapter(causal, lora, seed=0).to(device).eval().requires_grad_(False)


def main() -> None:
    parser = arguments(__doc__ or "", takes=("small",))
    parser.add_argument("--only", nargs="+", help="ways, by the beginning of their names")
    parser.add_argument("--shape", choices=[*SHAPES], help="with --gpu: one of the shapes")
    parser.add_argument("--profile", action="store_true", help="the kernels of every way, not of the first only")
    options = parser.parse_args()
    device = start(options)
    transformers.logging.set_verbosity_error()
    names = [name for name in shapes_of(options) if options.shape in (None, name)]
    head = ["shape", "rows", "way", "ms a token", "tokens per second", "prefill, ms"]
    report(options, head, [row for name in names for row in measured(name, options, device)])


if __name__ == "__main__":
    main()
