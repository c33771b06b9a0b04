"""What opsd uses of DeepSpeed's internals (0.19), attribute by attribute and why: to shard a model, to discard the
gradients of an update that will not be made, to find what it holds of each weight, and at its start. In one place, so
that a new DeepSpeed is checked against one file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from opsd_cli.engine.process_group import Ranks
from opsd_cli.engine.training_state import Held, held_whole

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


def shard_in_turn(init: Any, module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
    """Leave each rank its shards of `module`, whose parameters are taken to `device` one after another: no card and no
    host ever holds more than shards and one parameter, beside the files that a machine maps once. `init` is DeepSpeed's
    `zero.Init` of an empty module. Collective."""
    largest = max(parameter.numel() for parameter in module.parameters())
    # One buffer for all: what is given back to a host's allocator parameter by parameter leaves holes between shards.
    buffer = torch.empty(largest, dtype=dtype, device=device)
    for parameter in module.parameters():
        # DeepSpeed broadcasts rank 0's weights into those of the others. What is written to in a mapped file becomes
        # memory of the rank's own, until the last tensor of that file is gone.
        parameter.data = buffer[: parameter.numel()].view(parameter.shape).copy_(parameter.data)
        init._convert_to_zero_parameters([parameter])


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


def held_weights(optimizer: Any, parameters: Mapping[str, nn.Parameter], *, stage: int, ranks: Ranks) -> list[Held]:
    """What this rank holds of each trained weight, where the optimizer has it. `optimizer` is DeepSpeed's."""
    if stage == 0:
        return held_whole(parameters)
    found = []
    for name, parameter in parameters.items():
        if stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            owner, start = optimizer.fp32_partitioned_groups_flat[group], ranks.rank * size
            size = max(0, min(size, parameter.ds_numel - start))  # what lies behind fills ranks up to equal parts
        elif (fragment := parameter._hp_mapping) is not None:
            owner = optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
            start, offset = fragment.lp_fragment_address.start, fragment.hp_fragment_address.start
            size = fragment.hp_fragment_address.numel
        else:  # other ranks have all of it
            continue
        found.append(Held(name, parameter, start, owner.detach().narrow(0, offset, size), owner, offset))
    if stage < 3:
        optimizer._wait_for_offload_copies()
    return found
