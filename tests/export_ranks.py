"""Run by test_export on two ranks: trains each variant for two steps, saves a checkpoint of it and exports it, beside
its own logits."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gradient_ranks import OPTIM, WEIGH, Variant, make_policy, make_rollouts, source_of
from support import plain_objective
from transformers import AutoTokenizer

from opsd_cli.data.pairing import pair
from opsd_cli.engine.checkpoint import CheckpointStore, RunState
from opsd_cli.engine.export import Exporter
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import resolve
from opsd_cli.engine.process_group import connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.settings.config import ZeroSettings

PROBE = [5, 9, 33, 2, 71]


@dataclass(frozen=True)
class Exported(Variant):
    half: bool = False  # weights in bfloat16


VARIANTS = [
    Exported("whole_tied_0", 0),
    Exported("whole_tied_1", 1),
    Exported("whole_tied_2", 2),
    Exported("whole_untied_3", 3, tied=False),
    Exported("whole_tied_3", 3),
    Exported("lora_tied_0", 0, lora=True),
    Exported("lora_tied_3", 3, lora=True),
    Exported("lora_untied_1", 1, lora=True, tied=False),
    Exported("whole_half_2", 2, half=True),
    Exported("whole_half_offloaded_3", 3, half=True, offloaded=True),
    Exported("lora_half_3", 3, lora=True, half=True),
    # The last, because DeepSpeed keeps the group of ranks for the rest of the process.
    Exported("whole_untied_hpz_3", 3, tied=False, hpz=2),
]


def main(root: Path) -> None:
    ranks = connect(torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(resolve("bundled:tiny", None, key="model.path")[0])
    for variant in VARIANTS:
        source = source_of(root, variant)
        source = replace(source, dtype=torch.bfloat16) if variant.half else source
        policy, lora = make_policy(source, variant)
        engine = ZeroEngine(
            policy, GenerationView(policy, source, lora), ranks,
            zero=ZeroSettings(
                stage=variant.stage, offload_optimizer="cpu" if variant.offloaded else "none",
                offload_parameters="none", bucket_mib=1, hpz_ranks=variant.hpz, overlap=False, persist_below=0,
                gather="auto",
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
        checkpoints = root / f"{variant.name}_run" / "checkpoints"
        if ranks.rank == 0:
            checkpoints.mkdir(parents=True)
        state = RunState(2, ranks.world_size, 0, 0, "data", "model")
        CheckpointStore(checkpoints, engine, keep_last=2).save(2, None, state=lambda state=state: state)
        exporter = Exporter(source, tokenizer, export_dtype="auto", own_template=False)
        exporter.export(engine, root / variant.name)
        if ranks.rank == 0:
            torch.save(logits, root / f"{variant.name}.pt")
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
