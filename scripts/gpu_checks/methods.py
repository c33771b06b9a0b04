"""Two real steps of every part of a method: teachers, divergences, clips, supports, targets, token rules and samplers.
Objective and gradient norm of the first are compared with plain PyTorch in fp32 on the CPU, for the same rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from gpu_checks import twin
from gpu_checks.check import Bench, Check, Figure, Found

CHOICES: dict[str, tuple[str, ...]] = {
    "teacher live": ("teacher=live",),
    "teacher initial": ("teacher=initial",),
    "teacher ema": ("teacher=ema_fast",),
    "teacher sync": ("teacher=sync", "teacher.every=1"),
    "teacher blend": ("teacher=blend",),
    "teacher external": ("teacher=external", "teacher.path=bundled:tiny_teacher"),
    "teacher external, sharded": (
        "teacher=external", "teacher.path=bundled:tiny_teacher", "teacher.placement=sharded",
    ),
    "teacher external, offloaded": (
        "teacher=external", "teacher.path=bundled:tiny_teacher", "teacher.placement=offloaded",
    ),
    "reverse_kl": ("divergence=reverse_kl",),
    "jsd": ("divergence=jsd",),
    "skew_forward_kl": ("divergence=skew_forward_kl",),
    "skew_reverse_kl": ("divergence=skew_reverse_kl",),
    "total_variation": ("divergence=total_variation",),
    "sampled_token": ("divergence=sampled_token",),
    "cross_entropy": ("method=sft",),
    "clip entry": ("clip=entry",),
    "clip neutral": ("clip=neutral",),
    "clip token": ("clip=token",),
    "support teacher_top100": ("support=teacher_top100",),
    "support student_top256": ("support=student_top256",),
    "support union_top100": ("support=union_top100",),
    "target barycentre": ("target=barycentre",),
    "target minus_free": ("target=minus_free",),
    "tokens uncertain": ("tokens=uncertain", "model.dtype=float32"),
    "tokens supported": ("tokens=supported", "model.dtype=float32"),
    "importance cap": ("loss.importance_cap=2.0", "sampling.top_p=0.9"),
    "sampler dataset": ("sampler=dataset",),
}  # fmt: skip
ON_A_CPU = ("teacher ema", "teacher external", "jsd")
OBJECTIVE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
NORM = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def checks(bench: Bench) -> list[Check]:
    return [*choices(bench, CHOICES, ON_A_CPU), Check("its own teacher", partial(own_teacher, bench))]


def choices(bench: Bench, words: Mapping[str, tuple[str, ...]], on_a_cpu: Sequence[str]) -> list[Check]:
    """A check for each name, of a run with its words."""
    why = f"on a card only: a CPU checks {len(on_a_cpu)} of these"
    return [Check(name, partial(compare, bench, own), "" if name in on_a_cpu else why) for name, own in words.items()]


def compare(bench: Bench, words: tuple[str, ...]) -> Found:
    stage = twin.build_run(words, bench.device)
    first = twin.take_step(stage, 0)
    objective, norm = twin.objective_and_norm(stage, [sample.rollout for sample in first.samples])
    second = twin.take_step(stage, 1)
    dtype = stage.run_data.source.dtype
    found = first.metrics
    figures = (
        Figure("objective", relative(found["loss/objective"], objective), OBJECTIVE[dtype]),
        Figure("gradient norm", relative(found["optim/grad_norm"], norm), NORM[dtype]),
        Figure("updates refused", sum(report.refused != "" for report in (first, second)), 0),
    )
    return Found(figures, f"objective {objective:.4g}, then {second.metrics.get('loss/objective', math.nan):.4g}")


def own_teacher(bench: Bench) -> Found:
    """A student with the same prompt and weights as its teacher has nothing to learn: objective and gradient are 0."""
    stage = twin.build_run(("teacher=live", "context=none"), bench.device)
    found = twin.take_step(stage, 0).metrics
    figures = (Figure("objective", abs(found["loss/objective"]), 1e-5), Figure("norm", found["optim/grad_norm"], 1e-4))
    return Found(figures)


def relative(found: float, expected: float) -> float:
    """Over the expected number, or a hundredth where that is next to nothing (a clip makes it so)."""
    return abs(found - expected) / max(abs(expected), 0.01)
