"""Room on the disk: how large a run's checkpoints and model will be, and whether they fit, known before the first step.
Owns the estimate (within a few percent of what is written; tests/test_runs.py) and the refusal."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from opsd_cli.engine.policy import Policy
from opsd_cli.engine.zero_config import effective_stage
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import OutsideError

FP32 = 4  # bytes
SLACK_BYTES = 16 * 2**20  # events, samples, logs, tokenizer


@dataclass(frozen=True)
class Counts:
    """Numbers of weights, and the bytes of one. `head`: those of an output head that is tied to the embeddings, which
    DeepSpeed writes even where frozen weights are left out."""

    whole: int
    trained: int
    head: int
    itemsize: int

    @property
    def has_adapter(self) -> bool:
        return self.trained < self.whole


def counts_of(policy: Policy, dtype: torch.dtype) -> Counts:
    """The numbers of a policy that is not sharded yet."""
    parameters = list(policy.lm.parameters())
    head = policy.causal.get_output_embeddings().weight.numel() if policy.causal.config.tie_word_embeddings else 0
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Counts(sum(p.numel() for p in parameters), trained, head, dtype.itemsize)


def checkpoint_bytes(counts: Counts, *, stage: int, teacher: str, ranks: int) -> int:
    """One checkpoint: weights, optimizer (two moments, and above stage 0 the fp32 weights) and a moving teacher."""
    if stage == 3:
        weights = 0  # they are in the optimizer's shards
    elif counts.has_adapter:
        weights = counts.trained + counts.head
    else:
        weights = counts.whole
    copies = 1 if stage == 3 else ranks  # a teacher's copy is sharded where the weights are
    held = {"ema": FP32 * (counts.whole if counts.has_adapter else counts.trained), "sync": counts.itemsize}
    held["sync"] *= counts.trained
    optimizer = (2 if stage == 0 else 3) * FP32 * counts.trained
    return counts.itemsize * weights + optimizer + copies * held.get(teacher, 0)


def check_space(folder: Path, policy: Policy, config: Config, *, dtype: torch.dtype, ranks: int) -> None:
    """Raise OutsideError when the disk of the run folder cannot hold what the run will keep."""
    counts = counts_of(policy, dtype)
    stage = effective_stage(config.zero, dtype, ranks=ranks)
    one = checkpoint_bytes(counts, stage=stage, teacher=config.teacher.plugin_name, ranks=ranks)
    model = counts.itemsize * counts.whole
    kept = config.checkpoint.keep_last + 1 + (config.eval.every > 0)  # one is being written; the best is kept as well
    written = min(kept, 2 + config.train.steps // max(1, config.checkpoint.every or config.train.steps))
    needed = written * one + model + SLACK_BYTES
    own = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # of an earlier attempt
    free = shutil.disk_usage(folder).free
    if needed > free + own:
        raise OutsideError(
            f"the disk of {folder} has {in_gib(free)} free and this run needs {in_gib(needed - own)} more: {written} "
            f"checkpoints of {in_gib(one)} (checkpoint.keep_last={config.checkpoint.keep_last} and one being written) "
            f"and the model of {in_gib(model)}; free some space, lower checkpoint.keep_last or choose another run.root"
        )


def in_gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
