"""Running out of memory: with train.halve_on_oom a step recovers, and its gradient is that of an undisturbed one;
without it the message names what to lower. On a card memory really runs out, in the first micro-batch; a planted error
comes later, when a part of the gradient is there already."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from gpu_checks import build, random_steps
from gpu_checks.check import Bench, Check, Figure, Found
from gpu_checks.gradients import flat
from opsd_cli.settings.config import LoraSettings
from opsd_cli.testing import fault_points
from opsd_cli.training.interruptions import explain_out_of_memory
from opsd_cli.training.loop import Parts, train_step

SHARE = 0.7  # of what the whole batch needs beyond the weights
APART = {torch.float32: 1e-4, torch.bfloat16: 3e-3}
NAMED = ("train.micro_batch_tokens", "sampling.max_completion_tokens", "loss.chunk_mib", "train.halve_on_oom")
VOCABULARY = 4096
CASES = (
    ("bf16 stage 2", torch.bfloat16, 2, build.NO_LORA),
    ("bf16 stage 3", torch.bfloat16, 3, build.NO_LORA),
    ("bf16 stage 2 LoRA", torch.bfloat16, 2, build.LORA),
    ("fp32 stage 0", torch.float32, 0, build.NO_LORA),
    ("fp32 stage 3", torch.float32, 3, build.NO_LORA),
)
ON_A_CPU = ("bf16 stage 2", "fp32 stage 0")


def checks(bench: Bench) -> list[Check]:
    made = []
    for name, dtype, stage, lora in CASES:
        planted = partial(recovers, bench, dtype, stage, lora, planted="oom@step.backward:2")
        real = partial(recovers, bench, dtype, stage, lora)
        why = "" if name in ON_A_CPU else f"on a card only: a CPU checks {' and '.join(ON_A_CPU)}"
        made.append(Check(f"recovers, {name}, planted", planted, why))
        made.append(Check(f"recovers, {name}", real, "needs a card: it fills its memory"))
    return [*made, Check("says what to lower", partial(explains, bench))]


def recovers(bench: Bench, dtype: torch.dtype, stage: int, lora: LoraSettings, *, planted: str = "") -> Found:
    """The gradient before the update, of a step with all the memory and of one that runs out of it."""
    pieces = 2 if planted else 1
    undisturbed, peak = gradient_of(*step_parts(bench, dtype, stage, lora, pieces=pieces))
    parts, engine = step_parts(bench, dtype, stage, lora, pieces=pieces)
    before = parts.budget.tokens
    with error_planted(planted) if planted else too_little(peak):
        disturbed, _ = gradient_of(parts, engine)
    apart = float((disturbed - undisturbed).norm() / undisturbed.norm())
    figures = (
        Figure("gradient apart", apart, APART[dtype]),
        Figure("halvings", float(parts.budget.tokens < before), 1.0, at_least=True),
    )
    return Found(figures, f"micro-batches of {parts.budget.tokens} tokens afterwards")


def step_parts(
    bench: Bench, dtype: torch.dtype, stage: int, lora: LoraSettings, *, recovery: bool = True, pieces: int = 1
) -> tuple[Parts, build.WatchedEngine]:
    """A step of so many micro-batches; on a card about two gigabytes of activations, all together."""
    rows, length, hidden = (6, 8, 32) if bench.is_small else (64, 64, 256)
    shape = build.qwen3(hidden=hidden, layers=4, heads=4, kv_heads=2, head_size=64, vocabulary=VOCABULARY)
    pairs = build.prompt_pairs(rows, VOCABULARY, student=length, teacher=3 * length)
    rollouts = build.random_rollouts(pairs, VOCABULARY, length=length)
    tokens = sum(len(r.prompt.teacher_ids) + len(r.completion_ids) for r in rollouts)
    budget = tokens // pieces + 4 * length  # rows are not cut, so micro-batches are a little larger than their share
    return random_steps.parts_of(
        build.random_model(shape, dtype=dtype, device=bench.device), bench, pairs, stage=stage, lora=lora,
        words=(f"train.micro_batch_tokens={budget}", f"train.halve_on_oom={str(recovery).lower()}"), rollouts=rollouts,
    )  # fmt: skip


def gradient_of(parts: Parts, engine: build.WatchedEngine) -> tuple[Tensor, int]:
    """The whole gradient of one step, and the most memory it took."""
    seen: list[Tensor] = []
    engine.watch = lambda: seen.append(flat(build.gradients(engine)))
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    report = train_step(0, parts, updates=0)
    assert not report.refused, report.refused
    peak = torch.cuda.max_memory_reserved() if engine.device.type == "cuda" else 0
    return seen[0], peak


@contextmanager
def error_planted(fault: str) -> Iterator[None]:
    fault_points.arm({fault_points.VARIABLE: fault})
    try:
        yield
    finally:
        fault_points.arm({})


@contextmanager
def too_little(peak: int) -> Iterator[None]:
    """Too little memory for a step that takes `peak` bytes, and enough for half of one."""
    gc.collect()
    torch.cuda.empty_cache()
    held, whole = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((held + SHARE * (peak - held)) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def explains(bench: Bench) -> Found:
    """The error that ends a run without recovery, in the words a user is shown."""
    _, peak = gradient_of(*step_parts(bench, torch.float32, 0, build.NO_LORA))
    parts, engine = step_parts(bench, torch.float32, 0, build.NO_LORA, recovery=False)
    text = ""
    with error_planted("oom@step.backward:1") if bench.is_small else too_little(peak):
        try:
            gradient_of(parts, engine)
        except torch.OutOfMemoryError as error:
            text = explain_out_of_memory(error, parts.config, step=1, ranks=1, on_gpu=not bench.is_small)
    missing = [name for name in NAMED if name not in text]
    return Found((Figure("settings not named", len(missing), 0),), ", ".join(missing) or text[:120])
