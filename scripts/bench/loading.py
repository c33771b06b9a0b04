"""Benchmark: the memory of a rank's own while two ranks load a model and shard it at stage 3, one parameter after
another and, for comparison, as DeepSpeed does by itself, which broadcasts into the mapped files.

    python scripts/bench/loading.py   # 100 M parameters in fp32 on the CPU, a minute

`own` is what no file backs (anonymous pages of /proc/self/smaps_rollup) above what it was before loading; pages of the
weights' files, mapped once on a machine however many ranks read them, are not in it. The update is the first one, and
must be the same to the last bit: the weights after it are named by their sha256. Owns the cases.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import arguments, report, start
from whole_runs import MEDIUM, ROOT, random_model

RANKS = 2
CASES = {"in turn": "one parameter after another", "whole": "as DeepSpeed does by itself"}


def own_mib() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


class Highest:
    """The largest value of `own_mib` while it is open."""

    mib = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                self.mib = max(self.mib, own_mib())

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield
        done.set()
        watcher.join()


def work(model: str, case: str, out: Path) -> None:
    """One rank: load, shard, one update."""
    sys.path.insert(0, str(ROOT / "tests"))
    from gradient_ranks import OPTIM, WEIGH, make_rollouts
    from support import plain_objective

    from opsd_cli.data.pairing import pair
    from opsd_cli.engine import zero as engines
    from opsd_cli.engine.generation_view import GenerationView
    from opsd_cli.engine.loading import Source, load_causal
    from opsd_cli.engine.packed import usable_layout
    from opsd_cli.engine.policy import Policy
    from opsd_cli.engine.process_group import connect, disconnect
    from opsd_cli.loss.divergences import ForwardKL
    from opsd_cli.settings.config import LoraSettings, ZeroSettings

    ranks = connect(torch.device("cpu"))
    if case == "whole":  # what `initialize` does with a model that is not sharded yet
        engines.shard = lambda policy, config, **named: engines.deepspeed.zero.Init(policy, config_dict_or_path=config)
    source = Source(model, None, torch.float32, "sdpa", False, True)
    settings = ZeroSettings(
        stage=3, offload_optimizer="none", offload_parameters="none", bucket_mib=1, hpz_ranks=1, overlap=False,
        persist_below=0,
                gather="auto",
    )  # fmt: skip
    before, highest, shard, held = own_mib(), Highest(), engines.shard, list[float]()

    def watched(*given: Any, **named: Any) -> None:  # what follows it is the optimizer, the same in both cases
        with highest.watching():
            shard(*given, **named)
        held.append(own_mib())

    engines.shard = watched
    causal = load_causal(source).requires_grad_(True)
    policy = Policy(causal, layout=usable_layout(causal, ranks).layout)
    loaded = own_mib()
    lora = LoraSettings(rank=0, alpha=8, dropout=0.0, targets=("q_proj",))
    engine = engines.ZeroEngine(
        policy, GenerationView(policy, source, lora), ranks,
        zero=settings, optim=OPTIM, steps=2, device=torch.device("cpu"), source=source,
    )  # fmt: skip
    mine = make_rollouts(0)[ranks.rank :: RANKS]
    (batch,) = pair([[(rollout, WEIGH(rollout)) for rollout in mine]])
    objective = plain_objective(ForwardKL(), temperature=1.0, chunk_bytes=2**20)
    loss = engine.student_loss(batch, engine.score(batch.teacher), objective)
    engine.backward(loss.weighted_sum, denominator=10.0, last=True)
    update = engine.step(0)
    digest = hashlib.sha256()
    for _, whole in engine.whole_parameters():  # on rank 0
        digest.update(whole.numpy().tobytes())
    found = {
        "own": [loaded - before, highest.mib - before, held[0] - before], "norm": update.grad_norm,
        "weights": digest.hexdigest()[:12] if ranks.rank == 0 else "",
    }  # fmt: skip
    (out / f"{case}_{ranks.rank}.json").write_text(json.dumps(found))
    disconnect()


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    if options.gpu:
        raise SystemExit("--gpu: the memory that is measured here is the host's, so it runs on a CPU")
    start(options)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model(Path(scratch) / "model", MEDIUM, dtype=torch.float32)
        size = (model / "model.safetensors").stat().st_size / 2**20
        print(f"# all weights are {size:.0f} MiB")
        for case in CASES:
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--standalone", __file__,
                 "--rank", str(model), case, scratch],
                check=True, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            for rank in range(RANKS):
                found = json.loads((Path(scratch) / f"{case}_{rank}.json").read_text())
                rows.append([CASES[case], rank, *found["own"], found["norm"], found["weights"]])
    columns = ["sharded", "rank", "own once loaded, MiB", "at its highest", "once sharded", "norm of the gradient",
               "weights after the update"]  # fmt: skip
    report(options, columns, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        work(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        main()
