"""Benchmark: what the settings of sharding change that change no result (`zero.overlap`, `zero.persist_below`,
`zero.gather`): seconds of a step's phases beside the same stage without them, in the same run.

    python scripts/bench/sharding.py        # 100 M parameters from config on the CPU, two ranks of a thread: 9 minutes
    python scripts/bench/sharding.py --gpu  # Qwen3-1.7B, as many ranks as there are GPUs (at least two)

The teacher is the live one: `zero.persist_below` goes with no copy of shards. On a CPU there are no streams on which
anything could overlap, and ranks are joined by memory, so that gathering costs what copying does. Owns the cases.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from measure import arguments, report, start
from whole_runs import MEDIUM, QWEN3_1_7B, middle, random_model, train

CASES = {
    "zero=stage2": ((), ("zero.overlap=true",)),
    "zero=stage3": ((), ("zero.overlap=true",), ("zero.persist_below=100000",), ("zero.gather=layer",)),
}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    start(options)
    ranks = torch.cuda.device_count() if options.gpu else 2
    if ranks < 2:
        raise SystemExit("sharding needs two GPUs: with one there is nobody to talk to")
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        shape, dtype = (QWEN3_1_7B, torch.bfloat16) if options.gpu else (MEDIUM, torch.float32)
        model = random_model(Path(scratch) / "model", shape, dtype=dtype)
        for stage, settings in CASES.items():
            plain = 0.0
            for number, own in enumerate(settings):
                words = [
                    f"model.path={model}", "teacher=live", stage, *own, f"launcher.ranks={ranks}",
                    f"train.steps={options.steps}", f"train.problems_per_step={4 * ranks}",
                    "sampling.max_completion_tokens=16", "eval.max_completion_tokens=16",
                    f"launcher.device={'cuda' if options.gpu else 'cpu'}",
                    *(["train.gradient_checkpointing=true"] if options.gpu else ["launcher.threads=1"]),
                ]  # fmt: skip
                steps = train(Path(scratch) / f"{stage[-1]}_{number}", words)
                seconds = middle(steps, "time/step")
                plain = plain or seconds
                phases = [middle(steps, f"time/{phase}") for phase in ("sample", "score", "update")]
                rows.append([stage, *(own or ("as it is",)), seconds, seconds / plain, *phases])
                print(f"# {rows[-1]}", flush=True)
    report(options, ["ZeRO", "setting", "step, s", "ratio", "sampling", "teacher", "student and update"], rows)


if __name__ == "__main__":
    main()
