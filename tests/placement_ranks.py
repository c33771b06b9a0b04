"""Run by test_placement on two ranks: a model and an external teacher become shards at stage 3, as opsd does it or,
for `whole`, as DeepSpeed does it by itself; then one update. Leaves what each rank held on the way, and the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from gradient_ranks import OPTIM, WEIGH, make_rollouts
from support import plain_objective

from opsd_cli.data.pairing import pair
from opsd_cli.engine import zero
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source, add_adapter, load_causal
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.settings.config import LoraSettings, ZeroSettings

NO_ADAPTER = LoraSettings(rank=0, alpha=8, dropout=0.0, targets=("q_proj",))
CPU = torch.device("cpu")
STAGE_3 = ZeroSettings(
    stage=3, offload_optimizer="none", offload_parameters="none", bucket_mib=1, hpz_ranks=1, overlap=False,
    persist_below=0,
                gather="auto",
)  # fmt: skip


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


class Watched:
    """`zero.Init` that notes this rank's own memory after each parameter."""

    def __init__(self) -> None:
        self.highest, self._convert = 0, Init._zero_init_param
        Init._zero_init_param = lambda init, parameter: self._note(init, parameter)

    def _note(self, init: Init, parameter: torch.nn.Parameter) -> None:
        self._convert(init, parameter)
        self.highest = max(self.highest, own_bytes())


def is_shards_only(module: torch.nn.Module) -> bool:
    """Whether no parameter is whole on this rank, and what it has of each is a half."""
    parameters = list(module.parameters())
    return all(
        parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
        and parameter.numel() == 0
        and parameter.ds_tensor.numel() == -(-parameter.ds_numel // 2)
        for parameter in parameters
    )


def run(root: Path, case: str, ranks: Ranks) -> None:
    if case == "whole":
        zero.shard = lambda *given, **named: None
    source = Source(str(root / "model"), None, torch.float32, "sdpa", False, True)
    causal = load_causal(source)
    layout = usable_layout(causal, ranks).layout
    policy = Policy(add_adapter(causal, NO_ADAPTER, seed=0), layout=layout)
    view, before, watched = GenerationView(policy, source, NO_ADAPTER), own_bytes(), Watched()
    engine = zero.ZeroEngine(
        policy, view, ranks, zero=STAGE_3, optim=OPTIM, steps=2, device=CPU, source=source,
    )  # fmt: skip
    found = {"highest": watched.highest - before, "shards": is_shards_only(policy)}
    before, watched.highest = own_bytes(), 0
    teacher = engine.load_other(source.path, None, placement="sharded")
    found |= {"teacher highest": watched.highest - before, "teacher shards": is_shards_only(teacher.policy)}
    mine = make_rollouts(0)[ranks.rank :: ranks.world_size]
    (batch,) = pair([[(rollout, WEIGH(rollout)) for rollout in mine]])
    objective = plain_objective(ForwardKL(), temperature=1.0, chunk_bytes=2**20)
    loss = engine.student_loss(batch, teacher.score(batch.teacher), objective)
    engine.backward(loss.weighted_sum, denominator=10.0, last=True)
    assert not engine.step(0).refused
    weights = dict(engine.whole_parameters())
    if ranks.rank == 0:
        torch.save(weights, root / f"{case}.pt")
    (root / f"{case}_{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    connected = connect(CPU)
    run(Path(sys.argv[1]), sys.argv[2], connected)
    disconnect()
