"""Run by test_nonfinite: a teacher that answers NaN at every ZeRO stage. Prints what became of the weights."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from gradient_ranks import OPTIM, WEIGH, Variant, make_policy, make_rollouts, source_of

from opsd_cli.data.pairing import pair
from opsd_cli.engine.ranks import connect, disconnect
from opsd_cli.engine.shadow import Shadow
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.method.divergence import ForwardKL
from opsd_cli.method.loss import TokenScores, distill
from opsd_cli.settings.config import ZeroSettings
from opsd_cli.settings.errors import GuardError


def weights(engine: ZeroEngine) -> torch.Tensor:
    with engine.generating() as lm:
        return torch.cat([parameter.detach().flatten() for parameter in lm.parameters()])


def main(root: Path) -> None:
    ranks = connect(torch.device("cpu"))
    for stage in range(4):
        variant = Variant("nan", stage)
        source = source_of(root, variant)
        policy, lora = make_policy(source, variant)
        engine = ZeroEngine(
            policy, Shadow(policy, source, lora), ranks,
            zero=ZeroSettings(stage=stage, offload_optimizer="none", offload_parameters="none", bucket_mib=1),
            optim=OPTIM, steps=2, device=torch.device("cpu"), source=source, end_ids=(1,), pad_id=0,
        )  # fmt: skip
        before = weights(engine)
        (batch,) = pair(make_rollouts(0), max_tokens=4096, pad_id=0, weigh=WEIGH)
        poisoned = TokenScores(torch.full_like(engine.score(batch.teacher).hidden_ND, torch.nan), None)
        loss = engine.student_loss(
            batch.student,
            partial(
                distill, teacher=poisoned, target_ids_N=batch.target_ids_N, weights_N=batch.weights_N,
                divergence=ForwardKL(), temperature=1.0, chunk_bytes=2**20,
            ),
        )  # fmt: skip
        engine.backward(loss.weighted_sum, denominator=10.0, last=True)
        try:
            engine.step(0)
        except GuardError as error:
            print(f"stage {stage}: refused, weights unchanged: {torch.equal(before, weights(engine))}: {error}")
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
