"""Forgetting the gradients of an update that will not be made: what DeepSpeed keeps of them at each stage. Owns that
knowledge of its internals; it is what DeepSpeed's own `step` does when it refuses a gradient, without the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def drop_gradients(optimizer: Any, parameters: Iterable[nn.Parameter], *, stage: int, offloaded: bool) -> None:
    """Forget everything accumulated since the last update, also what a pass that was broken off has left behind.
    `optimizer` is DeepSpeed's. Nothing is communicated."""
    if stage == 0:
        for parameter in parameters:
            parameter.grad = None
        return
    clear_broken_pass(optimizer, stage=stage)
    optimizer.zero_grad(set_to_none=True)  # at stage 3 also the number of micro-batches so far
    if offloaded:
        optimizer.reset_cpu_buffers()
    optimizer.averaged_gradients.clear()
    if stage == 3:
        optimizer._offload_boundary_param_ids = set()
        return
    optimizer.all_grad_tensors.clear()
    optimizer.micro_step_id = -1  # as at the start: the next backward is the first, which does not add
    if offloaded:
        optimizer._offload_accumulated_param_ids = set()


def clear_broken_pass(optimizer: Any, *, stage: int) -> None:
    """Undo what a forward or backward has begun and not ended: parameters made whole, gradients waiting in a bucket."""
    optimizer.exit_backward()
    optimizer.clear_backward_seen_flag()
    if stage == 3:
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()  # its buffer is used again
        optimizer.params_already_reduced.update(dict.fromkeys(optimizer.params_already_reduced, False))
        optimizer._partition_all_parameters()
        return
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.params_already_reduced[:] = [False] * len(optimizer.params_already_reduced)
    optimizer._release_ipg_buffers()
