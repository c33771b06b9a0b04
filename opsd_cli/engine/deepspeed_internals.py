"""What opsd takes from inside DeepSpeed (0.19), attribute by attribute and why: gradients of an update that will not be
made, and files that cannot be written or must not be read. In one place, so that a new DeepSpeed is read against one
file. Imports no DeepSpeed: the objects are those of the engine that `zero` has made.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from opsd_cli.engine.atomic_files import WRITE_ERRORS
from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.errors import DataError

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in torch's refusal


def drop_gradients(optimizer: Any, parameters: Iterable[nn.Parameter], *, stage: int, offloaded: bool) -> None:
    """Forget everything accumulated since the last update, also what a pass that was broken off has left behind: what
    DeepSpeed's own `step` does when it refuses a gradient, without the step. Nothing is communicated."""
    if stage == 0:
        for parameter in parameters:
            parameter.grad = None
        return
    clear_broken_pass(optimizer, stage=stage)
    optimizer.zero_grad(set_to_none=True)  # at stage 3 also the number of micro-batches so far
    if offloaded:
        # The sums live in pinned CPU buffers that zero_grad does not know.
        optimizer.reset_cpu_buffers()
    optimizer.averaged_gradients.clear()
    if stage == 3:
        # Which parameters' gradients have crossed to the CPU in this update.
        optimizer._offload_boundary_param_ids = set()
        return
    optimizer.all_grad_tensors.clear()
    optimizer.micro_step_id = -1  # as at the start: the next backward is the first, which does not add
    if offloaded:
        optimizer._offload_accumulated_param_ids = set()


def clear_broken_pass(optimizer: Any, *, stage: int) -> None:
    """Undo what a forward or backward has begun and not ended: parameters made whole, gradients waiting in a bucket."""
    # Flags by which DeepSpeed's hooks tell the first gradient of a backward pass from the others.
    optimizer.exit_backward()
    optimizer.clear_backward_seen_flag()
    if stage == 3:
        for bucket in optimizer.ipg_buckets.values():
            # Without this the parameters of the broken pass would be reduced with the next one's. Its buffer stays.
            bucket.clear_params()
        optimizer.params_already_reduced.update(dict.fromkeys(optimizer.params_already_reduced, False))
        # Parameters that the broken pass had gathered stay whole until somebody partitions them.
        optimizer._partition_all_parameters()
        return
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.params_already_reduced[:] = [False] * len(optimizer.params_already_reduced)
    # At stages 1 and 2 the buffers are allocated for each pass; kept, they would be held beside the next ones.
    optimizer._release_ipg_buffers()


class DeferredErrorWriter:
    """DeepSpeed's checkpoint engine, with a `save` and a `makedirs` that keep the first error until the save is over.

    A rank whose disk is full must still take part in every collective of the save, or the other ranks wait for it. And
    a file that would run code when it is unpickled is refused in words.
    """

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
        """Raises DataError for a file that holds more than tensors and plain values."""
        try:
            return self._writer.load(path, map_location=map_location)
        except pickle.UnpicklingError as error:
            named = _GLOBAL.search(str(error))
            what = named.group(1) if named else "an object that is not a tensor"
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
        return getattr(self._writer, name)  # everything else DeepSpeed asks of its writer
