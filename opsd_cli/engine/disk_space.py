"""How much disk a run's checkpoints and model will take, and the refusal, before the first step, of a run that does not
fit. The estimate is within a few percent of what is written (tests/test_runs.py)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from opsd_cli.engine.device import DTYPES
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.weight_copies import parameter_counts
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import OutsideError

FP32 = 4  # bytes
SLACK_BYTES = 16 * 2**20  # events, samples, logs, tokenizer


@dataclass(frozen=True)
class Counts:
    """Numbers of weights, and the bytes of one."""

    total: int
    trained: int
    itemsize: int
    state_itemsize: int = FP32  # of an optimizer's numbers

    @property
    def has_adapter(self) -> bool:
        return self.trained < self.total


def checkpoint_bytes(counts: Counts, *, teacher: str) -> int:
    """One checkpoint, however it is sharded: the trained weights as the optimizer keeps them, its two moments, and a
    moving teacher."""
    teacher_bytes = {
        "ema": FP32 * (counts.total if counts.has_adapter else counts.trained),
        "sync": counts.itemsize * counts.trained,
    }
    return 3 * counts.state_itemsize * counts.trained + teacher_bytes.get(teacher, 0)


def check_space(folder: Path, policy: Policy, config: Config, *, dtype: torch.dtype) -> None:
    """Raise OutsideError when the disk of the run folder cannot hold what the run will keep."""
    numbers = parameter_counts(policy)
    state = DTYPES[config.optim.state_dtype].itemsize
    counts = Counts(numbers["parameters"], numbers["trainable_parameters"], dtype.itemsize, state)
    one = checkpoint_bytes(counts, teacher=config.teacher.plugin_name)
    # Merged weights may be written in fp32 (`engine.export`).
    is_wide = counts.has_adapter and config.model.export_dtype != "weights"
    model = (max(FP32, counts.itemsize) if is_wide else counts.itemsize) * counts.total
    kept = config.checkpoint.keep_last + 1 + (config.eval.every > 0)  # one is being written; the best is kept as well
    written = min(kept, 2 + config.train.steps // max(1, config.checkpoint.every or config.train.steps))
    needed = written * one + model + SLACK_BYTES
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # by an earlier attempt
    free = shutil.disk_usage(folder).free
    if needed > free + used:
        raise OutsideError(
            f"the disk of {folder} has {in_gib(free)} free and this run needs {in_gib(needed - used)} more: {written} "
            f"checkpoints of {in_gib(one)} (checkpoint.keep_last={config.checkpoint.keep_last} and one being written) "
            f"and the model of {in_gib(model)}; free some space, lower checkpoint.keep_last or choose another run.root"
        )


def in_gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
