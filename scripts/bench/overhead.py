"""Benchmark: what a step costs besides the model's own arithmetic, and how near that arithmetic is to the machine's.

    python scripts/bench/overhead.py                # the quickstart workload, one thread, a minute
    python scripts/bench/overhead.py --model medium # 100 M parameters from config
    python scripts/bench/overhead.py --gpu          # Qwen3-1.7B from config

`outside` is the share of a step that is in none of its three phases: grading, pairing, records, the guard. A phase's
arithmetic is 2 operations per weight and token forwards, 4 more backwards; attention and the reading of prompts before
sampling are left out. `of roofline` is its rate over that of a matrix product measured here after the run: for scoring
and training of one with as many rows as a role has tokens, for sampling of one with as many rows as there are rollouts,
which reads each weight once for few of them. Owns the counting.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import arguments, report, start, synchronize
from transformers import AutoConfig, PreTrainedConfig
from whole_runs import MEDIUM, QWEN3_1_7B, TINY, middle, random_model, train


def product_rate(rows: int, width: int, inner: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of [rows, inner] @ [inner, width], the median of twenty."""
    left, right = (
        torch.randn(rows, inner, device=device, dtype=dtype),
        torch.randn(width, inner, device=device, dtype=dtype),
    )
    seconds = []
    for _ in range(25):
        synchronize()
        begin = time.perf_counter()
        torch.nn.functional.linear(left, right)
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * rows * width * inner / statistics.median(seconds[5:])


def weights_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Weights of all layers, and of the output head."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * kv + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer, config.vocab_size * config.hidden_size


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", choices=["tiny", "medium"], default="tiny")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    options.threads = options.threads or 1
    device = start(options)
    dtype = torch.bfloat16 if options.gpu else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        model = TINY
        if options.gpu or options.model == "medium":
            model = random_model(Path(scratch) / "model", QWEN3_1_7B if options.gpu else MEDIUM, dtype=dtype)
        problems, completion = (32, 512) if options.gpu else (8, 32) if options.model == "medium" else (16, 64)
        words = [
            f"model.path={model}", f"train.steps={options.steps}", f"train.problems_per_step={problems}",
            f"sampling.max_completion_tokens={completion}", f"eval.max_completion_tokens={completion}",
            f"launcher.device={device.type}", f"launcher.threads={options.threads}",
            f"train.gradient_checkpointing={str(options.gpu).lower()}",
        ]  # fmt: skip
        steps = train(Path(scratch) / "runs", words)
        config = AutoConfig.from_pretrained(model)
    whole = middle(steps, "time/step")
    tokens = middle(steps, "tokens/completion")
    scored = middle(steps, "tokens/scored")
    layers, head = weights_of(config)
    wide = product_rate(int(scored / 2), config.intermediate_size, config.hidden_size, device, dtype)
    narrow = product_rate(problems, config.intermediate_size, config.hidden_size, device, dtype)
    # Half of the scored tokens, roughly, stand under each prompt. The update phase holds the loss: a product for the
    # logits of each role and two for the gradients of the head, which is trained.
    backwards = 8 if options.gpu else 6  # with the layers run once more under gradient checkpointing
    work = {
        "sample": (2 * (layers + head) * tokens, narrow),
        "score": (layers * scored, wide),
        "update": (backwards * layers * scored / 2 + 8 * head * tokens, wide),
    }
    rows = []
    for phase, (operations, rate) in work.items():
        seconds = middle(steps, f"time/{phase}")
        rows.append(
            [phase, seconds, seconds / whole, operations / seconds / 1e9, rate / 1e9, operations / seconds / rate]
        )
    inside = sum(middle(steps, f"time/{phase}") for phase in work)
    rows.append(["outside", whole - inside, 1 - inside / whole, "", "", ""])
    report(options, ["phase", "seconds", "share of step", "GFLOP/s", "GFLOP/s of a product", "of roofline"], rows)


if __name__ == "__main__":
    main()
