"""Benchmark: a whole training step, sampling to update; ours beside TRL's SDFT and DeepSpeed's rollouts and JSD loss.

    python scripts/bench/step.py                # the quickstart workload, one thread, about five minutes
    python scripts/bench/step.py --model medium # a Qwen3 of 100 M parameters from config, random weights
    python scripts/bench/step.py --model wide   # one of 44 M with the vocabulary of real ones, 151,936
    python scripts/bench/step.py --gpu          # Qwen3-1.7B, random weights, LoRA, 32 x 512: two minutes on an H100

Same model, prompts, completion limit, divergence (forward KL over the full vocabulary, the initial weights as teacher)
and optimizer (AdamW). Every contender runs in a process of its own, in turn; a figure is the median over the runs of
the median step, without the first two. A ratio is the median of the rounds' own ratios, since a machine that others use
changes its speed between rounds. Memory is the peak of the process, which counts its libraries as well, on a card that
of torch's allocator.

On a card weights are made where they are used, every completion is as long as it may be, and one step of each is left
out, since a process takes longer to start than a step. TRL's step there is **not measured whole**: it is measured with
an eighth and a quarter of the tokens and continued in a straight line (its peak is that of a quarter), because
`generate` takes half a minute for all. Owns the workloads and the table; the peers are in `peers.py`, our side of a
card in `step_on_card.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from measure import arguments, report, start
from whole_runs import MEDIUM, QWEN3_1_7B, SKIP, SMALL, TINY, WIDE, middle, random_model, train


@dataclass(frozen=True)
class Workload:
    """What every contender is given."""

    model: str  # a folder; on a card that of the tokenizer
    problems: int
    completion: int
    steps: int
    lr: float
    gpu: bool
    skip: int = SKIP  # first steps that do not count
    shape: dict[str, int] | None = None  # of the model that is made where it is used
    micro_batch_tokens: int = 16384
    micro_batch_rows: int | None = None  # for TRL, which counts rows; None: all


def workload(options, folder: Path) -> Workload:
    """The model folder is made where it is not the bundled one."""
    if options.gpu:
        problems, completion, shape = (4, 8, SMALL) if options.small else (32, 512, QWEN3_1_7B)
        return Workload(
            str(TINY), problems, completion, options.steps or 4, 1e-5, gpu=True, skip=1, shape=shape,
            micro_batch_rows=problems // 4,
        )  # fmt: skip
    options.steps = options.steps or 12
    if options.model != "tiny":
        path = random_model(folder, {"medium": MEDIUM, "wide": WIDE}[options.model], dtype=torch.float32)
        return Workload(str(path), 8, 32, options.steps, 1e-5, False)
    return Workload(str(TINY), 16, 64, options.steps, 3e-4, False)


def run_ours(work: Workload, folder: Path, threads: int) -> dict[str, float]:
    """`opsd train` as a user runs it; its events say how long a step took. On a card a process without its start."""
    if work.gpu:
        return run_child("step_on_card.py", json.dumps(asdict(work)), threads=threads)
    words = [
        f"model.path={work.model}", f"train.steps={work.steps}", f"train.problems_per_step={work.problems}",
        f"sampling.max_completion_tokens={work.completion}", f"eval.max_completion_tokens={work.completion}",
        f"optim.lr={work.lr}", "train.gradient_checkpointing=false", "loss.chunk_mib=256", "launcher.device=cpu",
        f"launcher.threads={threads}",
    ]  # fmt: skip
    steps = train(folder / "ours", words)
    names = {"step": "time/step", "sample": "time/sample", "score": "time/score", "update": "time/update"}
    found = {name: middle(steps, metric) for name, metric in names.items()}
    peak = max(step["memory/peak_gib"] for step in steps)
    return found | {"peak_gib": peak, "completion": middle(steps, "rollout/length_mean")}


def run_peer(name: str, work: Workload, folder: Path, threads: int) -> dict[str, float]:
    """One of `peers.py`."""
    # A step of theirs takes many times as long on a card, and two show that.
    own = replace(work, steps=min(work.steps, 2)) if work.gpu else work
    return run_child("peers.py", name, json.dumps(asdict(own)), str(folder), threads=threads)


def run_child(script: str, *words: str, threads: int) -> dict[str, float]:
    """A script beside this one, which prints what it measured as its last line."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *words],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{script} {words[0][:20]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(runs: list[dict[str, float]], ours: list[dict[str, float]]) -> float:
    """How many times as long a step takes as ours of the same round, the median over the rounds."""
    return statistics.median(run["step"] / own["step"] for run, own in zip(runs, ours, strict=True))


def main() -> None:
    parser = arguments(__doc__ or "", takes=("small", "rounds"))
    parser.add_argument("--model", choices=["tiny", "medium", "wide"], default="tiny")
    parser.add_argument("--steps", type=int, help="steps of each run (default 12; with --gpu 4, and 2 of a peer)")
    parser.add_argument("--peers", nargs="*", choices=["trl", "deepspeed"], help="default: both; with --gpu trl")
    options = parser.parse_args()
    if options.peers is None:
        options.peers = ["trl"] if options.gpu else ["trl", "deepspeed"]
    if options.gpu and "deepspeed" in options.peers:
        parser.error("--gpu compares with trl only: DeepSpeed's rollouts take a model from a folder and no adapter")
    options.rounds = options.rounds or (1 if options.gpu else 3)
    threads = options.threads = options.threads or (8 if options.gpu else 1)
    start(options)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", *options.peers)}
    with tempfile.TemporaryDirectory() as scratch:
        work = workload(options, Path(scratch) / "model")
        for number in range(options.rounds):
            for name, found in runs.items():
                folder = Path(scratch) / f"{name}_{number}"
                folder.mkdir()
                run = run_ours(work, folder, threads) if name == "ours" else run_peer(name, work, folder, threads)
                found.append(run)
                print(f"# round {number + 1}, {name}: {run}", flush=True)
    columns = ["step", "sample", "score", "update", "peak_gib", "completion"]
    for run in (run for found in runs.values() for run in found):
        run["rate"] = work.problems * run.get("completion", work.completion) / run["step"]
    columns.append("rate")
    medians = {
        name: {column: statistics.median(run.get(column, float("nan")) for run in found) for column in columns}
        for name, found in runs.items()
    }
    rows = [
        [name, *(median[column] for column in columns), ratio(runs[name], runs["ours"])]
        for name, median in medians.items()
    ]
    times = ["step, s", "sampling", "teacher", "student"]
    head = ["", *times, "peak GiB", "tokens / completion", "tokens/s", "step / ours"]
    report(options, head, rows)


if __name__ == "__main__":
    main()
