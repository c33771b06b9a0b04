"""What opsd uses of DeepSpeed's internals (0.19), attribute by attribute and why: to discard the gradients of an update
that will not be made, around the files it writes and reads, and at its start. In one place, so that a new DeepSpeed is
checked against one file.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from opsd_cli.engine.atomic_files import WRITE_ERRORS
from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.errors import DataError

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in torch's error message
_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # torch's own variable: a function that is to be compiled stays as it is


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Spares a start three seconds. To ask whether our AdamW is one of Muon's optimizers DeepSpeed imports those, and
    with them, for three functions that are never called here, the whole of torch's compiler."""
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_COMPILER]
        if before is not None:
            os.environ[_NO_COMPILER] = before


def drop_gradients(optimizer: Any, parameters: Iterable[nn.Parameter], *, stage: int, offloaded: bool) -> None:
    """Discard everything accumulated since the last update, and what an interrupted pass has left behind: what
    DeepSpeed's own `step` does when it refuses a gradient, without the step. Nothing is communicated."""
    # At stage 0 the gradients are the parameters' own.
    if stage == 0:
        for parameter in parameters:
            parameter.grad = None
        return
    clear_interrupted_pass(optimizer, stage=stage)
    # At stage 3 this also resets the number of micro-batches so far.
    optimizer.zero_grad(set_to_none=True)
    if offloaded:
        # The sums live in pinned CPU buffers that zero_grad does not touch.
        optimizer.reset_cpu_buffers()
    optimizer.averaged_gradients.clear()
    if stage == 3:
        # Which parameters' gradients were copied to the CPU in this update.
        optimizer._offload_boundary_param_ids = set()
        return
    optimizer.all_grad_tensors.clear()
    # As at the start: the next backward is the first, which overwrites instead of adding.
    optimizer.micro_step_id = -1
    if offloaded:
        optimizer._offload_accumulated_param_ids = set()


def clear_interrupted_pass(optimizer: Any, *, stage: int) -> None:
    """Undo what a forward or backward left unfinished: gathered parameters, gradients waiting in a bucket."""
    # Flags by which DeepSpeed's hooks tell the first gradient of a backward pass from the others.
    optimizer.exit_backward()
    optimizer.clear_backward_seen_flag()
    if stage == 3:
        for bucket in optimizer.ipg_buckets.values():
            # Else the parameters of the interrupted pass would be reduced with those of the next. The buffer stays.
            bucket.clear_params()
        optimizer.params_already_reduced.update(dict.fromkeys(optimizer.params_already_reduced, False))
        # Parameters that the interrupted pass had gathered stay whole until they are partitioned explicitly.
        optimizer._partition_all_parameters()
        return
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.params_already_reduced[:] = [False] * len(optimizer.params_already_reduced)
    # At stages 1 and 2 each pass allocates its own buffers; these would stay in memory beside the next ones.
    optimizer._release_ipg_buffers()


class DeferredErrorWriter:
    """DeepSpeed's checkpoint engine, with a `save` and a `makedirs` that hold the first error back until the save is
    over: a rank whose disk is full must still take part in every collective of the save, or the others wait for it."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._problem: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            reach("save.file")
            self._writer.save(state_dict, path)
        except WRITE_ERRORS as error:
            self._problem = self._problem or error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            self._writer.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._problem = self._problem or error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises DataError for a file that holds more than tensors and plain values, and so might run code."""
        try:
            return self._writer.load(path, map_location=map_location)
        except pickle.UnpicklingError as error:
            match = _GLOBAL.search(str(error))
            what = match.group(1) if match else "an object that is not a tensor"
            raise DataError(
                f"{path} is refused: it holds {what}, and a checkpoint must hold tensors and plain values only; it "
                "was not written by opsd, or has been changed since"
            ) from None

    def raise_problem(self) -> None:
        """Raise the first error since the last call, if there was one."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)  # everything else that DeepSpeed uses
