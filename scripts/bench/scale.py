"""Benchmark: one rank and two at ZeRO 0, 2 and 3, with the same work for each rank: the memory of a rank, and what the
ranks cost each other.

    python scripts/bench/scale.py        # 100 M parameters from config on the CPU, a thread for each rank, 10 minutes
    python scripts/bench/scale.py --gpu  # Qwen3-1.7B, as many ranks as there are GPUs

`share` is 1 - seconds of one rank / seconds of all, at the same number of problems per rank: communication, waiting for
the slower rank, and on one machine the memory bus they share. Memory is rank 0's: on a CPU of the whole process, on a
GPU of torch. Owns the cases.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from measure import arguments, report, start
from whole_runs import MEDIUM, QWEN3_1_7B, middle, random_model, train


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--problems", type=int, default=4, help="problems per rank and step (default 4)")
    options = parser.parse_args()
    start(options)
    most = torch.cuda.device_count() if options.gpu else 2
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        shape, dtype = (QWEN3_1_7B, torch.bfloat16) if options.gpu else (MEDIUM, torch.float32)
        model = random_model(Path(scratch) / "model", shape, dtype=dtype)
        for stage in (0, 2, 3):
            alone = 0.0
            for ranks in sorted({1, most}):
                words = [
                    f"model.path={model}", f"zero=stage{stage}", f"launcher.ranks={ranks}",
                    f"train.steps={options.steps}",
                    f"train.problems_per_step={options.problems * ranks}", "sampling.max_completion_tokens=16",
                    "eval.max_completion_tokens=16", f"launcher.device={'cuda' if options.gpu else 'cpu'}",
                    *(["train.gradient_checkpointing=true"] if options.gpu else ["launcher.threads=1"]),
                ]  # fmt: skip
                steps = train(Path(scratch) / f"{stage}_{ranks}", words)
                seconds, peak = middle(steps, "time/step"), max(step["memory/peak_gib"] for step in steps)
                alone = alone or seconds
                phases = [middle(steps, f"time/{phase}") for phase in ("sample", "score", "update")]
                rows.append([stage, ranks, seconds, *phases, 1 - alone / seconds, peak])
                print(f"# {rows[-1]}", flush=True)
    report(options, ["ZeRO", "ranks", "step, s", "sampling", "teacher", "student", "share", "peak GiB of a rank"], rows)


if __name__ == "__main__":
    main()
