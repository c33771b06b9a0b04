"""Run by test_reshard on one to three ranks. `write`: two updates in each layout, a checkpoint of them, and a third
update. `read`: each of those checkpoints in other layouts, one after another into the same engine, and the third update
from there. What an engine and its teacher hold is left as they save it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from gradient_ranks import OPTIM, TEACHERS, WEIGH, Variant, make_policy, make_rollouts, source_of
from support import plain_objective

from opsd_cli.data.pairing import filler_batch, pair
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.settings.config import ZeroSettings

KINDS = {
    "whole": Variant("whole", 0, teacher="ema"),
    "lora": Variant("lora", 0, lora=True, tied=False, teacher="ema"),
    "half": Variant("half", 2, tied=False, teacher="sync"),
}
WRITERS = {"2 ranks, stage 0": 0, "2 ranks, stage 2": 2, "2 ranks, stage 3": 3}
READERS = {1: (0,), 2: (1, 3), 3: (2, 3)}  # stages, by ranks
DTYPES = {"whole": torch.float32, "lora": torch.float32, "half": torch.bfloat16}


class Trained:
    """An engine and its teacher, in one layout."""

    def __init__(self, root: Path, kind: str, stage: int, ranks: Ranks) -> None:
        variant = KINDS[kind]
        source = replace(source_of(root, variant), dtype=DTYPES[kind])
        policy, lora = make_policy(source, variant)
        self.ranks = ranks
        self.engine = ZeroEngine(
            policy, GenerationView(policy, source, lora), ranks,
            zero=ZeroSettings(
                stage=stage, offload_optimizer="none", offload_parameters="none", bucket_mib=1, hpz_ranks=1,
            overlap=False, persist_below=0,
                gather="auto",
            ),
            optim=OPTIM, steps=4, device=torch.device("cpu"), source=source,
        )  # fmt: skip
        self.teacher = TEACHERS[variant.teacher].build(self.engine)

    def update(self, number: int) -> None:
        rollouts = make_rollouts(number)
        mine = rollouts[self.ranks.rank :: self.ranks.world_size]
        (batch,) = pair([[(rollout, WEIGH(rollout)) for rollout in mine]]) if mine else (filler_batch(rollouts[0]),)
        objective = plain_objective(ForwardKL(), temperature=1.0, chunk_bytes=2**20)
        loss = self.engine.student_loss(batch, self.teacher.score(batch.teacher), objective)
        self.engine.backward(loss.weighted_sum, denominator=10.0, last=True)
        assert not self.engine.step(number).refused
        self.teacher.after_update(number + 1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.save(folder)
        self.teacher.save(folder, rank=self.ranks.rank)
        self.ranks.barrier()

    def load(self, folder: Path) -> None:
        self.engine.load(folder)
        self.teacher.load(folder, rank=self.ranks.rank)


def write(root: Path, ranks: Ranks) -> None:
    for kind in KINDS:
        for name, stage in WRITERS.items():
            trained, folder = Trained(root, kind, stage, ranks), root / kind / name
            trained.save(folder / "start")
            for number in range(2):
                trained.update(number)
            trained.save(folder / "saved")
            trained.update(2)
            trained.save(folder / "next")


def read(root: Path, ranks: Ranks) -> None:
    for kind in KINDS:
        for stage in READERS[ranks.world_size]:
            trained = Trained(root, kind, stage, ranks)
            for name in WRITERS:
                folder = root / kind / name / f"{ranks.world_size} ranks, stage {stage}"
                trained.load(root / kind / name / "saved")
                trained.save(folder / "saved")
                trained.update(2)
                trained.save(folder / "next")
            trained.load(root / kind / "2 ranks, stage 2" / "start")
            trained.save(root / kind / "2 ranks, stage 2" / f"{ranks.world_size} ranks, stage {stage}" / "start")


def main(what: str, root: Path) -> None:
    ranks = connect(torch.device("cpu"))
    {"write": write, "read": read}[what](root, ranks)
    disconnect()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
