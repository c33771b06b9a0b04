"""What `memory.py --gpu` runs: the peak of torch's allocator over one step, for one engine and every teacher and loss.
Owns its cases; the CPU's, which are whole runs, are in `memory.py`.

An engine is built once and takes all its cases one after another; only the teacher and the loss change. Before the
first it draws some short completions and makes an update, so that what a decoder and an optimizer keep is counted as in
a run; the rollouts of the measured steps are given. A teacher that does not fit is a row that says so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count

import torch
from measure import peak_resident_gib, report
from naive_worker import naive_distill
from on_card import build, parameters, parts_of, random_model, random_steps
from whole_runs import QWEN3_1_7B, QWEN3_8B, SMALL

import opsd_cli.loss.chunked_head
from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.policy import FrozenModel, Policy
from opsd_cli.engine.process_group import alone
from opsd_cli.loss.types import TokenScores
from opsd_cli.teachers.teachers import Initial, Live, Teacher
from opsd_cli.training.loop import Parts, train_step

FULL_BYTES = 18  # of a weight that is trained in bfloat16: itself, its copy, two moments and the gradient in fp32
COMPLETION = 1024
SHAPES = {"Qwen3-1.7B": QWEN3_1_7B, "Qwen3-8B": QWEN3_8B}
GIB = 2**30
Shape = dict[str, int]


@dataclass(frozen=True)
class Case:
    """A loss and a teacher; `times` is how large the second model is, 0 where there is none."""

    loss: str
    label: str
    times: int = 0


class OtherModel(Teacher):
    """The teacher of on-policy distillation: a second, frozen model of about `times` the weights."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        causal = random_model(shape, device)
        policy = Policy(causal, layout=usable_layout(causal, alone()).layout)
        self._model = FrozenModel(policy, policy, sharded=False, rows=shape["vocab_size"])

    def score(self, batch: TokenBatch) -> TokenScores:
        return self._model.score(batch)


def wider(shape: Shape, times: int) -> Shape:
    """About `times` the weights: as many more layers. The vocabulary's share stays what it is, as in real families."""
    heads = shape["num_attention_heads"] + shape["num_key_value_heads"]
    layer = shape["hidden_size"] * (2 * heads * shape["head_dim"] + 3 * shape["intermediate_size"])
    more = (times - 1) * parameters(shape) / layer
    return shape | {"num_hidden_layers": shape["num_hidden_layers"] + round(more)}


def cases(adapter: str, times: list[int]) -> list[Case]:
    """OPSD first. Under LoRA `initial` is the model without its adapter, and `live` needs no less."""
    own = ["OPSD, initial", *(["OPSD, live"] if adapter == "full" else [])]
    return [
        case
        for loss in ("fused", "naive")
        for case in (*(Case(loss, label) for label in own), *(Case(loss, f"OPD, teacher {n}x", n) for n in times))
    ]


def measure(name: str, shape: Shape, adapter: str, times: list[int], device: torch.device) -> dict[Case, float | str]:
    """The peak of every case in GiB, or why it has none."""
    begin = time.monotonic()
    room = torch.cuda.mem_get_info(device)[0] / GIB if device.type == "cuda" else float("inf")
    least = parameters(shape) * (FULL_BYTES if adapter == "full" else 2) / GIB
    if least > room:
        return dict.fromkeys(cases(adapter, times), f"needs {least:.0f} GiB")
    length = 16 if shape is SMALL else COMPLETION
    pairs = build.prompt_pairs(4, shape["vocab_size"], student=length // 8, teacher=3 * length // 8)
    # Of the completions that are drawn before anything is measured.
    words = ("sampling.max_completion_tokens=16", "eval.max_completion_tokens=16", "loss.chunk_mib=256")
    parts, engine = parts_of(shape, device, pairs, adapter=adapter, words=words)
    parts = replace(parts, teacher=Live().build(engine))
    numbers = count()
    run_step(parts, numbers)
    rollouts = build.random_rollouts(pairs, shape["vocab_size"], length=length)
    parts = replace(parts, sampler=random_steps.Given(rollouts))
    found: dict[Case, float | str] = {}
    for case in cases(adapter, times):
        needed = parameters(wider(shape, case.times)) * 2 / GIB if case.times else 0.0
        if least + needed > room:
            found[case] = f"needs {least + needed:.0f} GiB"
            continue
        found[case] = peak_of(case, parts, numbers, shape, device)
        said = found[case] if isinstance(found[case], str) else f"{found[case]:.3f} GiB"
        print(f"# {name}, {adapter}, {case.loss}, {case.label}: {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    return found


def peak_of(case: Case, parts: Parts, numbers: Iterator[int], shape: Shape, device: torch.device) -> float | str:
    """Of one step with the case's teacher, which lives as long."""
    free(device)
    try:
        teacher = teacher_of(case, parts, shape, device)
        with naive_loss() if case.loss == "naive" else nullcontext():
            return peak_gib(lambda: run_step(replace(parts, teacher=teacher), numbers), device)
    except torch.OutOfMemoryError:
        parts.engine.drop_gradients()
        return "does not fit"
    finally:
        teacher = None
        free(device)


def teacher_of(case: Case, parts: Parts, shape: Shape, device: torch.device) -> Teacher:
    if case.times:
        return OtherModel(wider(shape, case.times), device)
    return (Initial() if case.label.endswith("initial") else Live()).build(parts.engine)


def run_step(parts: Parts, numbers: Iterator[int]) -> None:
    number = next(numbers)
    refused = train_step(number, parts, updates=number).refused
    assert not refused, f"the {refused} of a measured step is not finite"


def peak_gib(run: Callable[[], None], device: torch.device) -> float:
    """The most memory that was allocated at once while `run` ran, with what was there before."""
    if device.type == "cpu":
        return peak_resident_gib(run)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / GIB


def free(device: torch.device) -> None:
    """What nothing refers to any more; engines and models stand in circles of references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def naive_loss() -> Iterator[None]:
    """The loss of most code: logits of all tokens at once, and autograd."""
    own = opsd_cli.loss.chunked_head.distill
    opsd_cli.loss.chunked_head.distill = naive_distill
    try:
        yield
    finally:
        opsd_cli.loss.chunked_head.distill = own


def rows_of(name: str, adapter: str, found: dict[Case, float | str]) -> list[list[object]]:
    """Each OPD beside each OPSD of the same loss, and what the second saves of the first."""
    rows: list[list[object]] = []
    for case, peak in found.items():
        if not case.times:
            continue
        for own, least in found.items():
            if own.times or own.loss != case.loss:
                continue
            saved = f"{1 - least / peak:.0%}" if isinstance(peak, float) and isinstance(least, float) else ""
            rows.append([name, adapter, case.loss, case.label, peak, own.label, least, saved])
    return rows


def main(options, device: torch.device) -> None:
    shapes = {"small": SMALL} if options.small else {name: SHAPES[name] for name in options.models}
    lines: list[list[object]] = []
    for name, shape in shapes.items():
        for adapter in options.weights:
            lines += rows_of(name, adapter, measure(name, shape, adapter, options.teachers, device))
            free(device)
    report(options, ["model", "weights", "loss", "OPD", "GiB", "OPSD", "GiB", "saved"], lines)
