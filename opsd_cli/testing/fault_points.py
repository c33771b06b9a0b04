"""Fault points: places where a test makes a run die, stall or fail, by the environment variable OPSD_FAULT. Owns the
closed tables of points and kinds and what each kind does. Off unless a rank was started with the variable; then a
point costs one comparison. No command has an option for it, and a run without the variable cannot be changed by it.

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
from collections.abc import Mapping
from dataclasses import dataclass

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import did_you_mean

VARIABLE = "OPSD_FAULT"

POINTS: dict[str, str] = {
    "load.data": "data, tokenizer and prompts are ready",
    "load.weights": "the weights are in memory",
    "load.engine": "DeepSpeed has started and the teacher is built",
    "resume.loaded": "engine and teacher hold the checkpoint; the files still have the lines written after it",
    "resume.taken_back": "the lines written after the checkpoint are gone",
    "decode.token": "one more token of a batch of completions is drawn",
    "step.sampled": "the step's completions are drawn",
    "step.scored": "the teacher has scored a micro-batch",
    "step.loss": "the objective of a micro-batch is made; what became of it is not yet agreed on",
    "step.backward": "the objective of a micro-batch is known; its backward pass follows",
    "step.accumulated": "the gradient of a micro-batch is added",
    "step.before_update": "all gradients of the step are there",
    "step.after_update": "the optimizer has moved the weights",
    "step.teacher_moved": "the teacher has seen the update",
    "step.reported": "the step's event and samples are written",
    "eval.decoded": "a batch of held-out problems is completed",
    "eval.recorded": "the evaluation's event is written",
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
    "end.recorded": "the event that ends the run is written",
}
"""Every place where a fault can be asked for, and what has just happened there."""

KINDS: dict[str, str] = {
    "kill": "SIGKILL to itself",
    "term": "SIGTERM to itself",
    "int": "SIGINT to itself",
    "raise": "a RuntimeError, as a bug gives",
    "enospc": "the OSError of a full disk",
    "oom": "torch.OutOfMemoryError",
    "stall": "sleeps",
    "nonfinite": "the place itself makes its number NaN",
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
        self._faults, self._reached = faults, Counter[str]()

    def reach(self, point: str) -> bool:
        """Carry out what is due here; True when the place has to carry it out itself."""
        assert point in POINTS, f"unknown fault point {point!r}"
        self._reached[point] += 1
        times = self._reached[point]
        due = [f for f in self._faults if f.point == point and (times == f.first or (f.repeats and times > f.first))]
        for fault in due:
            carry_out(fault)
        return any(fault.kind == "nonfinite" for fault in due)

    def counts(self) -> dict[str, int]:
        """How often each point has been reached so far."""
        return dict(self._reached)


_plan: Plan | None = None


def reach(point: str) -> bool:
    """Say that a point is reached. True asks the place to make its number NaN; false unless a test asked for it."""
    return _plan is not None and _plan.reach(point)


def armed() -> bool:
    """Whether this process has a plan: for a place that must prepare its point."""
    return _plan is not None


def reached() -> dict[str, int]:
    """How often each point was reached since this process was armed."""
    return _plan.counts() if _plan is not None else {}


def arm(environ: Mapping[str, str]) -> None:
    """Take up the faults of this rank. Raises ConfigError for one that cannot be understood."""
    global _plan
    spec = environ.get(VARIABLE)
    _plan = Plan(faults_of(spec, rank=int(environ.get("RANK", "0")))) if spec else None


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
    if fault.kind in ("kill", "term", "int"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[fault.kind])
    elif fault.kind == "stall":
        time.sleep(fault.seconds)
    elif fault.kind == "raise":
        raise RuntimeError(f"fault asked for at {fault.point}")
    elif fault.kind == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fault.kind == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. A fault asked for it.")
