"""Run by test_shared_rows on three ranks, of which two say that they are on one machine: what each rank is told, and
that the ranks of a node do their reading once."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from opsd_cli.data.microbatches import plan_microbatches
from opsd_cli.data.pairing import Weighed
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.data.shared_rows import SharedRows
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.settings.errors import DataError

PROMPTS = [PromptPair(Problem(str(i), "q", "s", "1"), (1,) * (i + 1), (2,) * (20 - i)) for i in range(7)]


def drawn_by(rank: int) -> list[Weighed]:
    rollouts = [
        Rollout(PROMPTS[place], (3,) * (5 * place % 11 + 1), "stop", (), place, number)
        for place in range(rank, 7, 3)
        for number in range(4)
    ]
    return [(rollout, [1.0] * len(rollout.completion_ids)) for rollout in rollouts]


def check_rows(ranks: Ranks) -> None:
    rows = SharedRows(drawn_by(ranks.rank), ranks, PROMPTS.__getitem__)
    for budget in (300, 70, 20):
        mine = [batch for batch in rows.dealt(max_tokens=budget, padded=False, shares=False) if batch]
        everything = [drawn_by(rank) for rank in range(3)]
        assert mine == plan_microbatches(everything, rank=ranks.rank, max_tokens=budget, padded=False)


def check_talk(ranks: Ranks) -> None:
    assert ranks.to_first("x" * ranks.rank) == (["", "x", "xx"] if ranks.rank == 0 else [])
    assert ranks.hand_out(["a", "b" * 10**6, "c"] if ranks.rank == 0 else []) == ("a", "b" * 10**6, "c")[ranks.rank]
    assert ranks.from_first(ranks.rank + 7) == 7
    assert ranks.largest(ranks.rank) == 2
    assert ranks.first_of(None) is None
    assert ranks.first_of(None if ranks.rank == 0 else ranks.rank) == 1
    assert ranks.refusal("") == ""
    assert ranks.refusal("no" if ranks.rank else "") == "no (on rank 1 of 3)"


def read(ranks: Ranks, file: Path) -> str:
    with file.open("a") as log:
        log.write(f"{ranks.rank}\n")
    return "what was read"


def refuse() -> None:
    raise DataError("no such file")


def main(folder: Path) -> None:
    ranks = connect(torch.device("cpu"), machine="two" if os.environ["RANK"] == "2" else "one")
    node = ranks.node
    assert (node.rank, node.world_size) == {0: (0, 2), 1: (1, 2), 2: (0, 1)}[ranks.rank]
    check_talk(ranks)
    check_rows(ranks)
    ranks.barrier()
    if ranks.rank != 2:  # one after another, so that the file has an order
        assert node.once(partial(read, ranks, folder / "read_by")) == "what was read"
    ranks.barrier()
    if ranks.rank == 2:
        assert node.once(partial(read, ranks, folder / "read_by")) == "what was read"
    assert node.in_turn(lambda: "first", lambda: "later") == ("later" if ranks.rank == 1 else "first")
    for work in (node.once, lambda refuse: node.in_turn(refuse, lambda: None)):
        with pytest.raises(DataError, match="no such file"):
            work(refuse)
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
