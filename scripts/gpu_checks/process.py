"""One rank as a process: its group, the buffers of its model, where its parameters lie, and the fingerprint by which a
resume knows its weights again."""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.distributed as dist

from gpu_checks import build
from gpu_checks.check import Bench, Check, Figure, Found
from gpu_checks.gradients import accumulated
from gpu_checks.gradients import config as small_config
from opsd_cli.engine.fingerprint import fingerprint
from opsd_cli.engine.process_group import nccl_device
from opsd_cli.teachers.teachers import Initial
from opsd_cli.training.clock import PhaseClock

NEEDS_CARD = "needs a card: it is about one"


def checks(bench: Bench) -> list[Check]:
    return [
        Check("NCCL knows its device", partial(bound_device, bench), NEEDS_CARD),
        *(Check(f"rotations stay fp32, stage {stage}", partial(buffers, bench, stage)) for stage in (2, 3)),
        *(Check(f"parameters stay, stage {stage}", partial(pointers, bench, stage)) for stage in (0, 1, 2)),
        Check("fingerprint as on a CPU", partial(fingerprints, bench), NEEDS_CARD),
        Check("phases by the card's clock", partial(phases, bench), NEEDS_CARD),
    ]


def bound_device(bench: Bench) -> Found:
    """A group without `device_id` guesses its device at the first collective, and may wait for ever there. One rank
    communicates with nobody, and is not bound."""
    build.ranks_of(bench.device)
    bound = dist.distributed_c10d._get_default_group().bound_device_id
    wanted = nccl_device(bench.device, world_size=dist.get_world_size(), version=torch.__version__)
    return Found((Figure("otherwise bound", float(bound != wanted), 0),), f"{dist.get_backend()}, device_id {bound}")


def buffers(bench: Bench, stage: int) -> Found:
    """DeepSpeed converts a model to bf16; a rotation in bf16 is off by a radian after some hundred tokens."""
    causal = build.random_model(small_config(), dtype=torch.bfloat16, device=bench.device)
    engine = build.engine_of(causal, bench, stage=stage)
    rotations = [buffer for name, buffer in engine.policy.named_buffers() if "inv_freq" in name]
    assert rotations, "the model has no rotations"
    wrong = sum(buffer.dtype is not torch.float32 for buffer in rotations)
    return Found((Figure("rotations not fp32", wrong, 0),))


def pointers(bench: Bench, stage: int) -> Found:
    """Whether an update moves parameters elsewhere: information for whoever captures them in a graph."""
    dtype = torch.float32 if stage == 0 else torch.bfloat16
    engine = build.engine_of(build.random_model(small_config(), dtype=dtype, device=bench.device), bench, stage=stage)
    places = {name: parameter.data_ptr() for name, parameter in engine.policy.named_parameters()}
    accumulated(engine, Initial().build(engine), bench, 1, keep=True)
    engine.step(0)
    moved = sum(places[name] != parameter.data_ptr() for name, parameter in engine.policy.named_parameters())
    return Found((Figure("moved", moved), Figure("parameters", len(places))))


def fingerprints(bench: Bench) -> Found:
    """A run that began on one device must know its weights on another."""
    causal = build.random_model(small_config(), dtype=torch.bfloat16, device=torch.device("cpu"))
    there = fingerprint(causal)
    here = fingerprint(causal.to(bench.device))
    return Found((Figure("different", float(here != there), 0),), f"{there[:12]} on a CPU, {here[:12]} here")


def phases(bench: Bench) -> Found:
    """A phase that only queues work has the seconds of that work, without the host waiting in it; one that only reads a
    number has next to none."""
    clock = PhaseClock(bench.device, lambda phase: None)
    left = torch.randn(4096, 4096, device=bench.device)
    torch.mm(left, left)
    torch.cuda.synchronize(bench.device)
    clock.begin(0)
    begin = time.perf_counter()
    with clock.phase("time/score"):
        for _ in range(40):
            left = left @ left / 64
        queued = time.perf_counter() - begin
    with clock.phase("time/update"):
        float(left[0, 0])
    whole = time.perf_counter() - begin
    seconds = clock.metrics(1.0)
    figures = (
        Figure("of the whole", seconds["time/score"] / whole, 0.9, at_least=True),
        Figure("the phase that reads", seconds["time/update"] / whole, 0.1),
        Figure("queued after", queued / whole, 0.5),
    )
    return Found(figures)
