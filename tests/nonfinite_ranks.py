"""Run by test_nonfinite on one or two ranks, at every ZeRO stage and in every type: an update that is refused for its
gradient, one that is dropped for its loss, then a good one. Leaves what became of the weights, beside what the good one
alone makes of them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed.distributed_c10d as c10d
from gradient_ranks import OPTIM, WEIGH, Variant, make_policy, make_rollouts, source_of
from support import plain_objective

from opsd_cli.data.pairing import pair
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.loss.types import TokenLoss
from opsd_cli.settings.config import ZeroSettings

PATIENCE = timedelta(minutes=77)


def weights(engine: ZeroEngine) -> torch.Tensor:
    with engine.generating() as lm:
        return torch.cat([parameter.detach().flatten() for parameter in lm.parameters()])


def make_engine(root: Path, stage: int, dtype: torch.dtype, ranks: Ranks, *, offload: str = "none") -> ZeroEngine:
    variant = Variant("nonfinite", stage)
    source = replace(source_of(root, variant), dtype=dtype)
    policy, lora = make_policy(source, variant)
    return ZeroEngine(
        policy, GenerationView(policy, source, lora), ranks,
        zero=ZeroSettings(stage=stage, offload_optimizer=offload, offload_parameters="none", bucket_mib=1, hpz_ranks=1,
                          overlap=False, persist_below=0, gather="auto"),
        optim=OPTIM, steps=2, device=torch.device("cpu"), source=source,
    )  # fmt: skip


def trains_in_float16() -> bool:
    """Whether this CPU has the products in float16 that DeepSpeed asks for."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def timeouts_of_groups() -> dict[str, float]:
    """Seconds that a collective may wait, of every process group there is."""
    return {
        name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group, name in c10d._world.pg_names.items()
    }


def loss_of(engine: ZeroEngine) -> TokenLoss:
    (batch,) = pair([[(rollout, WEIGH(rollout)) for rollout in make_rollouts(0)]])
    return engine.student_loss(
        batch, engine.score(batch.teacher), plain_objective(ForwardKL(), temperature=1.0, chunk_bytes=2**20)
    )


def good_update(engine: ZeroEngine) -> torch.Tensor:
    engine.backward(loss_of(engine).weighted_sum, denominator=10.0, last=True)
    assert not engine.step(0).refused
    return weights(engine)


def main(root: Path) -> None:
    ranks = connect(torch.device("cpu"), patience=PATIENCE)
    found = {}
    types = (torch.float32, torch.bfloat16, *([torch.float16] if trains_in_float16() else []))
    whole = [(0, torch.float32, "none"), *((s, t, "none") for s in (1, 2, 3) for t in types)]
    for stage, dtype, offload in [*whole, *((s, torch.bfloat16, "cpu") for s in (1, 2, 3))]:
        engine = make_engine(root, stage, dtype, ranks, offload=offload)
        before = weights(engine)
        if dtype is torch.float16:  # the smallest scale: at a larger one an overflow is no fault of the gradient
            engine._optimizer.loss_scaler.cur_scale = 1
        # Only the last rank's is not finite: all must come to the same end.
        factor = math.inf if ranks.rank == ranks.world_size - 1 else 1.0
        engine.backward(loss_of(engine).weighted_sum * factor, denominator=10.0, last=True)
        refused = engine.step(0)
        unchanged = torch.equal(before, weights(engine))
        same = make_engine(root, stage, dtype, ranks, offload=offload)
        # Offloaded, the next update follows the refused one at once, and the other engine drops a whole gradient.
        dropping = engine if offload == "none" else same
        dropping.backward(loss_of(dropping).weighted_sum * factor, denominator=10.0, last=True)
        dropping.drop_gradients()
        found[f"stage {stage} {dtype} {offload}"] = {
            "refused": refused.refused,
            "norm is finite": math.isfinite(refused.grad_norm),
            "unchanged": unchanged,
            "scale": float(engine._optimizer.loss_scaler.cur_scale) if dtype is torch.float16 else None,
            "good update": torch.equal(good_update(engine), good_update(same)),
        }
    groups = dict.fromkeys(timeouts_of_groups(), PATIENCE.total_seconds())
    assert timeouts_of_groups() == groups
    assert len(groups) > 1 or ranks.world_size == 1  # DeepSpeed's are among them
    (root / f"found_{ranks.world_size}_{ranks.rank}.json").write_text(json.dumps(found))
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
