"""Run by test_shared_engine on four ranks, of which neighbours hold an engine together: one that counts in place of
vLLM, which like it waits in every step for all ranks of its group. Given the machine of each rank, and how many ranks
are to hold an engine: prints why they cannot. Given a folder too, each rank leaves what it drew there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.sampling.shared_engine import complete_together
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.sampling.vllm import VllmSampler
from opsd_cli.settings.errors import ConfigError

DRAWS = {0: 3, 1: 0, 2: 2, 3: 4}  # of each rank: the second has none, and both groups need other numbers of steps
STEPS = {0: 20, 1: 70}  # of each group, unless it is stopped


class CountingEngine:
    """Completes a draw with the numbers of its steps."""

    def __init__(self, group: Ranks, steps: int, *, fault: int) -> None:
        self.group, self.steps, self.fault = group, steps, fault
        self.asked: list[int] = []
        self.done = 0

    def complete(self, draws: list[Draw], stops: Callable[[], bool]) -> list[Completion]:
        self.asked = [draw.seed for draw in draws]
        for step in range(1, self.steps + 1):
            self.done = step
            places = self.group.gather(self.done)
            assert places == [self.done] * self.group.world_size, "all are in the same step"
            if stops():
                break
        return [Completion((draw.seed + self.fault, self.done), "length", (0.0, 0.0)) for draw in draws]


def draw(ranks: Ranks, group: Ranks, *, stopped: int | None = None, fault: int | None = None) -> dict:
    """What this rank gets, where rank `stopped` is asked to stop in its third step and rank `fault` draws other ids."""
    draws = [Draw((1,), seed=10 * ranks.rank + number) for number in range(DRAWS[ranks.rank])]
    engine = CountingEngine(group, STEPS[ranks.rank // 2], fault=int(ranks.rank == fault))
    try:
        done = complete_together(group, draws, engine.complete, lambda: ranks.rank == stopped and engine.done == 3)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"asked": engine.asked, "ids": [one.ids for one in done], "steps": engine.done}


def refusal(ranks: Ranks, count: int) -> str:
    sampler = VllmSampler(
        max_rows=1, max_positions=1, memory_share=0.5, cpu_cache_gib=1.0, graphs=False, tensor_parallel=count,
        prompt="student", dataset_share=0.0, placement="shared", processes=1, lag=0,
    )  # fmt: skip
    try:
        sampler.check_machines(ranks)
    except ConfigError as error:
        return str(error)
    return ""


def main(machines: str, count: int, root: Path | None) -> None:
    ranks = connect(torch.device("cpu"), machine=machines[int(os.environ["RANK"])])
    print(refusal(ranks, count))
    if root is not None:
        group = ranks.neighbours(count)
        found = {
            "group": [group.rank, group.world_size, group.gather(ranks.rank)],
            "alone": ranks.neighbours(1).world_size,
            "all": ranks.neighbours(4).gather(ranks.rank),
            "drawn": draw(ranks, group),
            "stopped": draw(ranks, group, stopped=3),
            "different": draw(ranks, group, fault=1),
        }
        (root / f"{ranks.rank}.json").write_text(json.dumps(found))
    disconnect()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3:] else None)
