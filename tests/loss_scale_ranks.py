"""Run by test_loss_scale on one or two ranks, on a CPU that computes in float16: updates of all weights and of
adapters, with the scale of the loss where it starts, far too large, and about to grow. Leaves what each update said and
what became of the weights, beside the same in float32."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from gradient_ranks import OPTIM, Variant, make_policy, source_of
from nonfinite_ranks import loss_of, weights

from opsd_cli.engine import zero_config
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.settings.config import ZeroSettings

UNCLIPPED = replace(OPTIM, max_grad_norm=1e6)  # a clip would cancel a wrong scale
UPDATES = 4
TOO_HIGH = 2.0**22


def make_engine(root: Path, stage: int, dtype: torch.dtype, ranks: Ranks, *, lora: bool, offload: str) -> ZeroEngine:
    variant = Variant("scaled", stage, lora=lora)
    source = replace(source_of(root, variant), dtype=dtype)
    policy, adapter = make_policy(source, variant)
    return ZeroEngine(
        policy, GenerationView(policy, source, adapter), ranks,
        zero=ZeroSettings(stage=stage, offload_optimizer=offload, offload_parameters="none", bucket_mib=1, hpz_ranks=1,
                          overlap=False, persist_below=0, gather="auto"),
        optim=UNCLIPPED, steps=100, device=torch.device("cpu"), source=source,
    )  # fmt: skip


def updates(engine: ZeroEngine, count: int) -> list[dict]:
    """So many updates that are made, each as often as it takes."""
    said: list[dict] = []
    while sum(not update["overflow"] for update in said) < count:
        before = weights(engine)
        for last in (False, True):  # two micro-batches
            engine.backward(loss_of(engine).weighted_sum, denominator=20.0, last=last)
        update = engine.step(0)
        assert not update.refused
        said.append(
            {
                "overflow": update.overflow,
                "scale": update.loss_scale,
                "norm": update.grad_norm,
                "moved": not torch.equal(before, weights(engine)),
            }
        )
    return said


def found(root: Path, stage: int, ranks: Ranks, *, lora: bool, offload: str = "none") -> dict:
    def engine_in(dtype: torch.dtype) -> ZeroEngine:
        return make_engine(root, stage, dtype, ranks, lora=lora, offload=offload)

    exact, plain, growing, high = engine_in(torch.float32), *(engine_in(torch.float16) for _ in range(3))
    start = weights(exact)
    said = {"float32": updates(exact, UPDATES), "plain": updates(plain, UPDATES)}
    zero_config.WINDOW = 2
    said["growing"] = updates(growing, UPDATES)
    zero_config.WINDOW = 200
    high._optimizer.loss_scaler.cur_scale = TOO_HIGH
    said["high"] = updates(high, UPDATES)
    high.save(root / f"checkpoint_{ranks.world_size}_{stage}_{lora}_{offload}")
    loaded = engine_in(torch.float16)
    loaded.load(root / f"checkpoint_{ranks.world_size}_{stage}_{lora}_{offload}")
    scalers = [vars(engine._optimizer.loss_scaler) for engine in (high, loaded)]

    def apart(one: ZeroEngine, other: ZeroEngine) -> float:
        return float((weights(one).double() - weights(other).double()).norm() / (weights(exact) - start).norm())

    return {
        **said,
        "plain - float32": apart(plain, exact),
        "growing - plain": apart(growing, plain),
        "high - plain": apart(high, plain),
        "scaler is restored": scalers[0] == scalers[1],
        "goes on alike": updates(high, 1) == updates(loaded, 1) and torch.equal(weights(high), weights(loaded)),
    }


def main(root: Path) -> None:
    ranks = connect(torch.device("cpu"))
    if ranks.world_size == 1:
        all_found = {
            "stage 0": found(root, 0, ranks, lora=False),
            "lora 3": found(root, 3, ranks, lora=True),
            "offload 2": found(root, 2, ranks, lora=False, offload="cpu"),
        }
    else:
        all_found = {f"stage {stage}": found(root, stage, ranks, lora=False) for stage in (2, 3)}
    (root / f"found_{ranks.world_size}_{ranks.rank}.json").write_text(json.dumps(all_found))
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
