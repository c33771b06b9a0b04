"""Fault points: places where a test makes a run die, stall or fail, by the environment variable OPSD_FAULT. A rank that
was started with the variable imports this file; nothing else does, and a run without it cannot be changed by it.

A point in the commit of a file stands in the code itself (`safety.commit_points`); every other one is a function that
is wrapped here while a fault is armed.

    OPSD_FAULT=kill@save.manifest:2                 SIGKILL to itself at the second time the point is reached
    OPSD_FAULT=rank1:raise@step.scored:3            on rank 1 only
    OPSD_FAULT=stall@save.engine:1:5                sleep five seconds (without a number: an hour)
    OPSD_FAULT=nonfinite@step.backward:4+           at the fourth time and every time after it
    OPSD_FAULT=enospc@save.file:1,term@step.scored:9    several
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from math import nan
from pkgutil import resolve_name
from typing import Any

from opsd_cli.loss.types import TokenLoss
from opsd_cli.safety import commit_points
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import did_you_mean

VARIABLE = "OPSD_FAULT"

COMMIT_POINTS: dict[str, str] = {
    "lines.half": "half of a line of events.jsonl or samples.jsonl is written",
    "save.folder": "the temporary folder of a checkpoint is made",
    "save.file": "a file of engine or teacher is about to be written",
    "save.engine": "this rank's part of the engine is written",
    "save.teacher": "this rank's part of the teacher is written",
    "save.state": "state.json is written",
    "save.manifest": "manifest.json is written",
    "save.synced": "one more file of a checkpoint or of the model is on the disk",
    "save.rename": "everything is on the disk; the rename follows",
    "save.renamed": "the checkpoint has its name; the pointer still names the one before",
    "save.pointer": "the new pointer stands beside the old one",
    "save.pointed": "the pointer names the new checkpoint",
    "save.aside": "an old checkpoint has lost its name and still has its files",
    "save.pruned": "one old checkpoint is gone",
    "export.folder": "the temporary folder of the model is made",
    "export.tokenizer": "the tokenizer is written, the weights are not",
    "export.weights": "the model is written under its temporary name",
    "export.renamed": "model/ has its name",
    "end.summary": "summary.json is written under its temporary name",
    "end.summarised": "summary.json has its name; the event that ends the run follows",
}
"""Places in the code that writes files, and what has just happened there."""


@dataclass(frozen=True)
class Seam:
    """A function that is wrapped: the point is reached after it, or before."""

    target: str
    meaning: str  # what has just happened
    before: bool = False


SEAMS: dict[str, Seam] = {
    "load.data": Seam("rank.context:load_run_data", "data, tokenizer and prompts are ready"),
    "load.weights": Seam("rank.run:fingerprint", "the weights are in memory"),
    "load.engine": Seam("rank.run:build_parts", "DeepSpeed has started and the teacher is built"),
    "resume.loaded": Seam(
        "engine.checkpoint:CheckpointStore.load", "the checkpoint is loaded; the lines written after it are still there"
    ),
    "resume.taken_back": Seam(
        "rank.run:Training._restore_from_events", "the lines written after the checkpoint are gone", before=True
    ),
    "decode.token": Seam("sampling.batch_decoder:_Run.one_token", "one more token of a batch of completions is drawn"),
    "step.sampled": Seam("training.loop:sample", "the step's completions are drawn"),
    "step.scored": Seam("training.loop:score_teacher", "the teacher has scored a micro-batch"),
    "step.loss": Seam("training.loop:student_loss", "a micro-batch has its loss, which no rank has looked at"),
    "step.backward": Seam("training.loop:backward", "all ranks know the loss; the backward pass follows", before=True),
    "step.accumulated": Seam("training.loop:backward", "the gradient of a micro-batch is added"),
    "step.before_update": Seam("training.loop:optimize", "all gradients of the step are there", before=True),
    "step.after_update": Seam("training.loop:optimize", "the optimizer has moved the weights"),
    "step.teacher_moved": Seam("training.loop:move_teacher", "the teacher has seen the update"),
    "step.reported": Seam("rank.run:Training.report", "the step's event and samples are written"),
    "eval.decoded": Seam("insight.evaluation:stop_together", "a batch of held-out problems is completed", before=True),
    "eval.kept": Seam("rank.measure:write_lines", "completions of an evaluation are in its file"),
    "eval.recorded": Seam("rank.measure:record", "everything about an evaluation is written"),
    "end.recorded": Seam("rank.recorder:Recorder.ended", "the event that ends the run is written"),
}
POINTS = COMMIT_POINTS.keys() | SEAMS.keys()

KINDS: dict[str, str] = {
    "kill": "SIGKILL to itself",
    "term": "SIGTERM to itself",
    "int": "SIGINT to itself",
    "raise": "a RuntimeError, as a bug gives",
    "enospc": "the OSError of a full disk",
    "oom": "torch.OutOfMemoryError",
    "stall": "sleeps",
    "nonfinite": "the loss becomes NaN (step.loss, step.backward)",
}

_SPEC = re.compile(r"(?:rank(\d+):)?([a-z]+)@([a-z_.]+):(\d+)(\+?)(?::([0-9.]+))?")


@dataclass(frozen=True)
class Fault:
    """One thing to do at the `first` time a point is reached, or from then on."""

    kind: str
    point: str
    first: int
    repeats: bool
    seconds: float


class Plan:
    """The faults of this rank and how often each point has been reached."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults, self.reached = faults, Counter[str]()

    def reach(self, point: str) -> bool:
        """Carry out what is due here; True when the place has to carry it out itself."""
        assert point in POINTS, f"unknown fault point {point!r}"
        self.reached[point] += 1
        times = self.reached[point]
        due = [f for f in self._faults if f.point == point and (times == f.first or (f.repeats and times > f.first))]
        for fault in due:
            carry_out(fault)
        return any(fault.kind == "nonfinite" for fault in due)


_plan: Plan | None = None
_originals: list[tuple[Any, str, Any]] = []  # of what is wrapped: owner, name, function


def reach(point: str) -> bool:
    """Say that a point is reached. True asks for a NaN."""
    return _plan is not None and _plan.reach(point)


def reached() -> dict[str, int]:
    """How often each point was reached since this process was armed."""
    return dict(_plan.reached) if _plan is not None else {}


def arm(environ: Mapping[str, str]) -> None:
    """Take up the faults of this rank, in place of those before; without the variable everything is as it was. Raises
    ConfigError for a fault that cannot be understood."""
    global _plan
    spec = environ.get(VARIABLE)
    _plan = Plan(faults_of(spec, rank=int(environ.get("RANK", "0")))) if spec else None
    commit_points.watch(_plan.reach if _plan is not None else None)
    while _originals:
        owner, name, function = _originals.pop()
        setattr(owner, name, function)
    for point, seam in SEAMS.items() if _plan is not None else ():
        module, _, attribute = seam.target.partition(":")
        scope, _, name = attribute.rpartition(".")
        owner = resolve_name(f"opsd_cli.{module}:{scope}")
        function = vars(owner)[name]
        _originals.append((owner, name, function))
        setattr(owner, name, _with_point(function, point, seam))


def _with_point(function: Callable[..., Any], point: str, seam: Seam) -> Callable[..., Any]:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not seam.before:
            made = function(*args, **kwargs)
            return _with_nan(made) if reach(point) else made
        if reach(point):
            args = tuple(map(_with_nan, args))
        return function(*args, **kwargs)

    return wrapped


def _with_nan(value: Any) -> Any:
    """A loss as NaN; anything else as it is."""
    return value._replace(weighted_sum=value.weighted_sum * nan) if isinstance(value, TokenLoss) else value


def faults_of(spec: str, *, rank: int) -> list[Fault]:
    """The faults of one rank in the words of the variable."""
    faults = []
    for item in spec.split(","):
        found = _SPEC.fullmatch(item.strip())
        if found is None:
            raise ConfigError(f"{VARIABLE}={item!r}: write [rankR:]KIND@POINT:N[+][:SECONDS]")
        only, kind, point, first, repeats, seconds = found.groups()
        for name, table in ((kind, KINDS), (point, POINTS)):
            if name not in table:
                raise ConfigError(f"{VARIABLE}={item!r}: there is no {name!r}{did_you_mean(name, list(table))}")
        if only is None or int(only) == rank:
            faults.append(Fault(kind, point, int(first), bool(repeats), float(seconds or 3600)))
    return faults


def carry_out(fault: Fault) -> None:
    """Do what a kind says, at once."""
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
    if fault.kind in signals:
        os.kill(os.getpid(), signals[fault.kind])
    elif fault.kind == "stall":
        time.sleep(fault.seconds)
    elif fault.kind == "raise":
        raise RuntimeError(f"fault asked for at {fault.point}")
    elif fault.kind == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fault.kind == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. A fault asked for it.")
