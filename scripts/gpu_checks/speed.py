"""Seconds and memory of a step at a real shape, by phase, with random weights: information, compared with nothing. Runs
alone on the card. A card with little free memory gets a smaller shape, whose name says so."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gpu_checks import build, random_steps
from gpu_checks.check import Bench, Check, Figure, Found
from opsd_cli.loss.chunk_rows import LossInputs
from opsd_cli.loss.chunked_head import distill
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.loss.types import Head, TokenScores
from opsd_cli.training.loop import Parts, train_step
from opsd_cli.training.step_report import StepReport

STEPS = 3  # the first is not counted: it allocates and compiles


@dataclass(frozen=True)
class Shape:
    """A model, the work of a step, and the gibibytes it should have free."""

    name: str
    lora: bool
    needs_gib: float
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 151_936
    rows: int = 32
    completion: int = 128
    prompts: tuple[int, int] = (120, 400)


SHAPES = {
    "LoRA": (
        Shape("Qwen3-1.7B", True, 24, 2048, 28, 16, 8),
        Shape("Qwen3-0.6B", True, 12, 1024, 28, 16, 8),
        Shape("Qwen3 of 0.15B", True, 4, 512, 12, 8, 4),
    ),
    "all weights": (
        Shape("Qwen3-0.6B", False, 32, 1024, 28, 16, 8),
        Shape("Qwen3 of 0.15B", False, 8, 512, 12, 8, 4),
    ),
}
TINY = Shape("a tiny Qwen3", False, 0, 64, 2, 4, 2, vocabulary=512, rows=4, completion=8, prompts=(12, 30))


def checks(bench: Bench) -> list[Check]:
    return [
        Check("step, LoRA", partial(step, bench, "LoRA")),
        Check("step, all weights", partial(step, bench, "all weights"), "on a card only: a CPU takes one shape"),
        Check("loss", partial(loss, bench)),
        Check("waits for the card in a step", partial(waits, bench), "needs a card: a CPU waits for nothing"),
    ]


def shape_of(bench: Bench, name: str) -> Shape:
    """The largest that fits into the memory that is free."""
    if bench.is_small:
        return TINY
    free = torch.cuda.mem_get_info(bench.device)[0] / 2**30
    fitting = [shape for shape in SHAPES[name] if shape.needs_gib <= free]
    assert fitting, f"{free:.1f} GiB are free, {SHAPES[name][-1].needs_gib} GiB are needed"
    return fitting[0]


def parts_of(bench: Bench, shape: Shape, *, lora: bool) -> tuple[Parts, build.WatchedEngine]:
    config = build.qwen3(
        hidden=shape.hidden, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads,
        head_size=32 if bench.is_small else 128, vocabulary=shape.vocabulary,
    )  # fmt: skip
    with bench.device:
        causal = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    pairs = build.prompt_pairs(shape.rows, shape.vocabulary, student=shape.prompts[0], teacher=shape.prompts[1])
    words = (f"sampling.max_completion_tokens={shape.completion}", "train.micro_batch_tokens=16384",
             "loss.chunk_mib=256")  # fmt: skip
    return random_steps.parts_of(
        causal, bench, pairs, words=words, stage=2, lora=build.LORA if lora else build.NO_LORA,
        checkpointing=not bench.is_small,
    )  # fmt: skip


def step(bench: Bench, name: str) -> Found:
    """Medians of the steps after the first."""
    shape = shape_of(bench, name)
    parts, engine = parts_of(bench, shape, lora=name == "LoRA")
    updates = timed_updates(engine)
    train_step(0, parts, updates=0)
    random_steps.reset_peak(bench)
    reports = [train_step(number, parts, updates=number) for number in range(1, STEPS)]

    def middle(metric: str) -> float:
        return statistics.median(report.metrics[metric] for report in reports)

    update = statistics.median(updates[1:])
    figures = [
        Figure("step", middle("time/step"), unit="s"),
        Figure("sample", middle("time/sample"), unit="s"),
        Figure("teacher", middle("time/score"), unit="s"),
        Figure("student", middle("time/update") - update, unit="s"),
        Figure("update", update, unit="s"),
        Figure("tokens/s", middle("tokens/per_second")),
        Figure("ms per sampled token", 1000 * middle("time/sample") / longest(reports)),
    ]
    if bench.device.type == "cuda":
        figures += [
            Figure("allocated", torch.cuda.max_memory_allocated() / 2**30, unit="GiB"),
            Figure("reserved", torch.cuda.max_memory_reserved() / 2**30, unit="GiB"),
        ]
    return Found(tuple(figures), f"{shape.name}, bf16, {shape.rows} rows of {shape.completion} tokens, stage 2")


def longest(reports: list[StepReport]) -> float:
    """Tokens of the longest completion: a batch takes one forward pass for each."""
    return statistics.median(max(len(sample.rollout.completion_ids) for sample in report.samples) for report in reports)


def timed_updates(engine: build.WatchedEngine) -> list[float]:
    """Filled with the seconds of every optimizer update."""
    seconds: list[float] = []
    own_step = engine.step

    def timed(number: int):
        synchronize(engine.device)
        start = time.perf_counter()
        update = own_step(number)
        synchronize(engine.device)
        seconds.append(time.perf_counter() - start)
        return update

    engine.step = timed  # type: ignore[method-assign]
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loss(bench: Bench) -> Found:
    """Forward and backward of the loss alone: milliseconds, and memory beyond its inputs."""
    rows, hidden, vocabulary = (64, 64, 4096) if bench.is_small else (2048, 2048, 151_936)
    generator = torch.Generator(device=bench.device).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=bench.device, dtype=torch.bfloat16)
    student_ND, weight_VD = make(rows, hidden).requires_grad_(), make(vocabulary, hidden) / hidden**0.5
    teacher_ND, ones_N = (student_ND + 0.3 * make(rows, hidden)).detach(), torch.ones(rows, device=bench.device)
    seconds = []
    for _ in range(4):
        synchronize(bench.device)
        start = time.perf_counter()
        inputs = LossInputs(
            Head(weight_VD, None), TokenScores(teacher_ND, None), weights_N=ones_N,
            target_ids_N=torch.zeros(rows, dtype=torch.long, device=bench.device), divergence=ForwardKL(),
            temperature=1.0, chunk_bytes=256 * 2**20,
        )  # fmt: skip
        made = distill(student_ND, inputs)
        made.weighted_sum.backward()
        synchronize(bench.device)
        seconds.append(time.perf_counter() - start)
    figure = Figure("forward and backward", 1000 * statistics.median(seconds[1:]), unit="ms")
    return Found((figure,), f"forward KL, bf16, N={rows:,}, D={hidden:,}, V={vocabulary:,}")


def waits(bench: Bench) -> Found:
    """Operations that make the processor wait for the card, counted by torch while a step runs."""
    shape = replace(shape_of(bench, "LoRA"), rows=8, completion=32)
    parts, _ = parts_of(bench, shape, lora=True)
    train_step(0, parts, updates=0)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            report = train_step(1, parts, updates=1)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places = Counter(place_of(warning) for warning in caught if "called a synchronizing" in str(warning.message))
    figures = (Figure("waits", places.total()), Figure("per sampled token", places.total() / longest([report])))
    said = ", ".join(f"{place} {count}x" for place, count in places.most_common(12))
    return Found(figures, f"{shape.name}: {said}")


def place_of(warning: warnings.WarningMessage) -> str:
    """The line of Python that made the host wait."""
    return f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
