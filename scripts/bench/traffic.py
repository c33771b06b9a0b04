"""Benchmark: what ranks tell each other of a step beside gradients and weights, and the host's time for it: as it is
(outlines to rank 0, a plan from there, rows that move), and with every rollout sent to every rank and planned there.

    python scripts/bench/traffic.py            # 2, 4 and 8 processes over gloo; 64 and 1,024 ranks as threads; minutes
    python scripts/bench/traffic.py --run DIR  # completions as long as those that a run has recorded (samples.jsonl)

Each rank draws 8 rollouts, four of each of two problems: student's prompt 256 tokens, teacher's 640, completions of 256
to 512 (as Qwen3's on GSM8K), 300 and 900 characters of text. Bytes are those that a rank sends and receives, as
serialised: of rank 0, and the most of any other. Host time is the processor's, of one thread: of rank 0, and the median
of the others. Over gloo also the wall time from the first word to the last row. A thread of this benchmark runs the
functions of a rank on its real rollouts; only the transport is a table (`opsd_cli.testing.pretended_ranks`). Owns the
cases.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import random
import socket
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from measure import arguments, report, start

from opsd_cli.data.microbatches import outlines_of, plan_microbatches, plan_rows
from opsd_cli.data.pairing import Weighed
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.data.shared_rows import SharedRows
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.testing.pretended_ranks import PretendedRanks, on_ranks

STUDENT, TEACHER, COMPLETIONS = 256, 640, range(256, 513)  # tokens
QUESTION, SOLUTION = 300, 900  # characters
PROBLEMS, GROUP = 2, 4  # of a rank
BUDGET = 8192  # tokens of a micro-batch
VOCABULARY = 150_000
ALL_BY_ONE = 8  # ranks up to which every one is a process


class Drawn:
    """The rollouts of a step; any rank can make those of any other."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths

    def prompt_at(self, place: int) -> PromptPair:
        numbers = random.Random(place)
        problem = Problem(str(place), "q" * QUESTION, "s" * SOLUTION, "1")
        student, teacher = (tuple(numbers.choices(range(VOCABULARY), k=k)) for k in (STUDENT, TEACHER))
        return PromptPair(problem, student, teacher)

    def of(self, rank: int) -> list[Weighed]:
        rows: list[Weighed] = []
        for place in range(rank * PROBLEMS, (rank + 1) * PROBLEMS):
            prompt, numbers = self.prompt_at(place), random.Random(-place - 1)
            for number in range(GROUP):
                ids = tuple(numbers.choices(range(VOCABULARY), k=numbers.choice(self._lengths)))
                rollout = Rollout(prompt, ids, "stop", tuple(-1.0 / (i + 1) for i in range(len(ids))), place, number)
                rows.append((rollout, [1.0] * len(ids)))
        return rows


def as_it_is(
    own: Sequence[Weighed], prompts: dict[int, PromptPair], ranks: Ranks | PretendedRanks, shares: bool
) -> None:
    SharedRows(own, ranks, prompts.__getitem__).dealt(max_tokens=BUDGET, padded=False, shares=shares)


def to_all(own: Sequence[Weighed], ranks: Ranks, shares: bool) -> None:
    plan_microbatches(ranks.gather(own), rank=ranks.rank, max_tokens=BUDGET, padded=False, shares=shares)


def as_threads(drawn: Drawn, size: int, *, shares: bool) -> list[PretendedRanks]:
    """What each rank has counted."""
    rows = [drawn.of(rank) for rank in range(size)]
    prompts = {row.place: row.prompt for of_rank in rows for row, _ in of_rank}
    _, ranks = on_ranks(size, lambda one: as_it_is(rows[one.rank], prompts, one, shares))
    return ranks


def sent_to_all(drawn: Drawn, size: int) -> tuple[int, float]:
    """Bytes that each rank receives where all rollouts go to all, and the seconds of one rank's processor."""
    parcels = [pickle.dumps(drawn.of(rank)) for rank in range(size)]
    begin = time.process_time()
    everything = [pickle.loads(parcel) for parcel in parcels]
    plan_microbatches(everything, rank=0, max_tokens=BUDGET, padded=False)
    return sum(map(len, parcels[1:])), time.process_time() - begin


def rank_of_many(
    rank: int, size: int, port: int, lengths: Sequence[int], rounds: int, results: multiprocessing.Queue
) -> None:
    """One process: medians of the wall seconds of both ways, by the clock of rank 0."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks, drawn = connect(torch.device("cpu")), Drawn(lengths)
    own = drawn.of(rank)
    prompts = {place: drawn.prompt_at(place) for place in range(size * PROBLEMS)}
    seconds: dict[str, list[float]] = {"as it is": [], "to all": []}
    for _ in range(rounds + 1):
        for name, work in (
            ("as it is", partial(as_it_is, own, prompts, ranks, False)),
            ("to all", partial(to_all, own, ranks, False)),
        ):
            ranks.barrier()
            begin = time.perf_counter()
            work()
            ranks.barrier()
            seconds[name].append(time.perf_counter() - begin)
    if rank == 0:
        results.put({name: statistics.median(values[1:]) for name, values in seconds.items()})
    disconnect()


def over_gloo(size: int, lengths: Sequence[int], rounds: int) -> dict[str, float]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=rank_of_many, args=(rank, size, port, lengths, rounds, results)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[str, float] = results.get(timeout=300)
    for process in processes:
        process.join(60)
    return found


def row_of(size: int, lengths: Sequence[int], options: argparse.Namespace, *, shares: bool) -> list[object]:
    drawn = Drawn(lengths)
    first, *others = as_threads(drawn, size, shares=shares)
    received, before = sent_to_all(drawn, size)
    wall = over_gloo(size, lengths, options.rounds) if size <= ALL_BY_ONE and not shares else {}
    outlines = [outlines_of(drawn.of(rank)) for rank in range(size)]
    plan = plan_rows(outlines, max_tokens=BUDGET, padded=False, shares=shares)
    moved = sum(home != rank for rank, batches in enumerate(plan) for batch in batches for home, _ in batch)
    times = [f"{1000 * wall[name]:.1f}" if wall else "" for name in ("as it is", "to all")]
    traffic = [(one.sent + one.received) / 1024 for one in (first, *others)]
    host = [1000 * seconds for seconds in (statistics.median(one.seconds for one in others), first.seconds, before)]
    row: list[object] = [
        f"{size:,}", "shared" if shares else "own", moved / (size * PROBLEMS * GROUP),
        max(traffic[1:]), traffic[0], 2 * received / 1024, *host, *times,
    ]  # fmt: skip
    print(f"# {row}", flush=True)
    return row


def recorded(folder: Path) -> list[int]:
    """The lengths of the completions that a run shows."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [len(json.loads(line)["completion_ids"]) for line in lines]


def main() -> None:
    parser = arguments(__doc__ or "", takes=("rounds",))
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run whose completions' lengths are taken")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4, 8, 64, 1024], help="how many (default 2 to 1,024)"
    )
    options = parser.parse_args()
    options.rounds = options.rounds or 7
    start(options)
    lengths = recorded(options.run) if options.run else list(COMPLETIONS)
    rows = [row_of(size, lengths, options, shares=shares) for size in options.ranks for shares in (False, True)]
    head = [
        "ranks", "prompts", "rows moved", "KiB of a rank", "of rank 0", "to all: of each",
        "host ms of a rank", "of rank 0", "to all: of each", "gloo, wall ms", "to all",
    ]  # fmt: skip
    report(options, head, rows)


if __name__ == "__main__":
    main()
