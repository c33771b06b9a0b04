"""Run by test_export on two ranks: trains each variant for two steps and exports it, beside its own logits."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gradient_ranks import OPTIM, WEIGH, Variant, make_policy, make_rollouts, source_of
from support import plain_objective
from transformers import AutoTokenizer

from opsd_cli.data.pairing import pair
from opsd_cli.engine.export import Exporter
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import resolve
from opsd_cli.engine.process_group import connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.settings.config import ZeroSettings

PROBE = [5, 9, 33, 2, 71]
VARIANTS = [
    Variant("whole_tied_2", 2),
    Variant("whole_untied_3", 3, tied=False),
    Variant("whole_tied_3", 3),
    Variant("lora_tied_3", 3, lora=True),
    Variant("lora_untied_1", 1, lora=True, tied=False),
]


def main(root: Path) -> None:
    ranks = connect(torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(resolve("bundled:tiny", None, key="model.path")[0])
    for variant in VARIANTS:
        source = source_of(root, variant)
        policy, lora = make_policy(source, variant)
        engine = ZeroEngine(
            policy, GenerationView(policy, source, lora), ranks,
            zero=ZeroSettings(
                stage=variant.stage, offload_optimizer="none", offload_parameters="none", bucket_mib=1, hpz_ranks=1
            ),
            optim=OPTIM, steps=2, device=torch.device("cpu"), source=source,
        )  # fmt: skip
        for step in range(2):
            (batch,) = pair([[(rollout, WEIGH(rollout)) for rollout in make_rollouts(step)]])
            loss = engine.student_loss(
                batch, engine.score(batch.teacher), plain_objective(ForwardKL(), temperature=1.0, chunk_bytes=2**20)
            )
            engine.backward(loss.weighted_sum, denominator=10.0, last=True)
            engine.step(step)
        with engine.generating() as lm, torch.no_grad():
            logits = lm(input_ids=torch.tensor([PROBE])).logits
        exporter = Exporter(policy, source, tokenizer, export_dtype="auto", own_template=False)
        exporter.export(engine, root / variant.name)
        if ranks.rank == 0:
            torch.save(logits, root / f"{variant.name}.pt")
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
