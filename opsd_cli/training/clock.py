"""What a step takes: seconds by phase, floating-point operations, memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from opsd_cli.data.problems import Rollout
from opsd_cli.sampling.samplers import Sampler
from opsd_cli.settings.registry import CompletesPrompt
from opsd_cli.training.engine_protocol import Engine

Function = TypeVar("Function", bound=Callable[..., Any])
Moment = float | torch.cuda.Event
"""Seconds of the host's clock, or a mark among a GPU's work."""


class PhaseClock:
    """Wall seconds by phase of the step that runs; on a GPU a phase lasts from the end of the work before it to the end
    of its own, by the GPU's clock, which the host does not wait for."""

    def __init__(self, device: torch.device, enter: Callable[[str], None]) -> None:
        self._device, self._enter = device, enter  # which is told the phase that begins
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start again for step `step`, counted from 0."""
        self._step, self._start = step, time.perf_counter()
        self._spans: list[tuple[str, Moment, Moment]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A name that begins with `time/` is a metric; others are only told."""
        start = self._now()
        self._enter(f"step {self._step + 1}: {name.removeprefix('time/')}")
        try:
            yield
        finally:
            if name.startswith("time/"):
                self._spans.append((name, start, self._now()))

    def _now(self) -> Moment:
        """On a GPU the moment when it has done what is queued so far: kernels run behind the host, whose own clock
        would charge a phase's work to the phase that reads a number."""
        if self._device.type != "cuda":
            return time.perf_counter()
        moment = torch.cuda.Event(enable_timing=True)
        moment.record(torch.cuda.current_stream(self._device))
        return moment

    def metrics(self, completion_tokens: float) -> dict[str, float]:
        """Seconds of each phase and of the whole step, tokens per second, and the peak of memory so far. To be called
        at the end of a step, when its numbers have been read and so its work is done."""
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            seconds[name] += seconds_between(start, end)
        whole = time.perf_counter() - self._start
        return {
            **seconds,
            "time/step": whole,
            "tokens/per_second": completion_tokens / whole,
            "memory/peak_gib": peak_bytes(self._device) / 2**30,
        }


def seconds_between(start: Moment, end: Moment) -> float:
    """Both of the same clock."""
    if isinstance(start, float):
        assert isinstance(end, float), "two moments by two clocks"
        return end - start
    assert not isinstance(end, float), "two moments by two clocks"
    end.synchronize()  # no wait where the work is done, which only a step that ends early does not know
    return float(start.elapsed_time(end)) / 1000


def phase(name: str) -> Callable[[Function], Function]:
    """Make a function, whose first argument is a step's parts, a phase of the step: timed, and shown while it lasts."""

    def wrap(function: Function) -> Function:
        @wraps(function)
        def timed(parts: Any, *args: Any, **kwargs: Any) -> Any:
            with parts.clock.phase(name):
                return function(parts, *args, **kwargs)

        return cast(Function, timed)

    return wrap


def compute_metrics(engine: Engine, seconds: float) -> dict[str, float]:
    """What all ranks have computed since the meter was read last, in so many seconds. Collective."""
    flops, repeated = engine.ranks.all_sum(astuple(engine.meter.take()))
    each = flops / seconds / engine.ranks.world_size
    metrics = {"compute/tflop": flops / 1e12, "compute/gflops_per_second": each / 1e9}
    if repeated and flops:
        metrics["compute/repeated"] = repeated / flops
    return metrics if engine.peak_flops is None else metrics | {"compute/mfu": each / engine.peak_flops}


def count_draws(engine: Engine, rollouts: Sequence[Rollout], sampler: Sampler) -> None:
    """Count what drawing these rollouts needed, each prompt once."""
    of_teacher = isinstance(sampler, CompletesPrompt) and sampler.prompt == "teacher"
    drawn: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        # Else it is the dataset's own, or was drawn on another device.
        if rollout.logprobs and rollout.lag is None:
            drawn[rollout.place].append(rollout)
    for group in drawn.values():
        prompt = group[0].prompt
        length = len(prompt.teacher_ids if of_teacher else prompt.student_ids)
        engine.meter.add_draws(length, [len(rollout.completion_ids) for rollout in group])


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has used so far: of its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux
