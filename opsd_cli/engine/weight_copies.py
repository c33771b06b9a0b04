"""Copies of the trainable weights: the initial teacher of full fine-tuning, moving averages.

A copy is stored as its parameter is: whole at ZeRO stages 0 to 2, as this rank's shard at stage 3. Copying and
averaging work element by element, so every rank treats its own shard and nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from opsd_cli.engine.merging import adapted_layers, update_of, weight_of
from opsd_cli.engine.quantized import size_of
from opsd_cli.engine.tensor_shards import Piece, TensorShards, refuse_other_weights, shard_file, write_pieces
from opsd_cli.engine.wide_adapters import WideAdapter

COPY = "teacher"  # of what a checkpoint holds of it


class WeightCopy:
    """A copy of some parameters, in fp32 if it moves, else in the parameter's type."""

    def __init__(self, parameters: dict[str, nn.Parameter], *, moves: bool) -> None:
        self._parameters = parameters
        # In bf16 the small increments of an average would be rounded away.
        dtype = torch.float32 if moves else None
        self._copies = {
            name: storage(p).detach().to(dtype=dtype or storage(p).dtype, copy=True)
            for name, p in self._parameters.items()
        }

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run with the copy in place of the weights."""
        originals = {name: storage(p).data for name, p in self._parameters.items()}
        try:
            # Pointers move; a tensor is allocated only where the types differ. The parameters stay the same objects,
            # so DeepSpeed's hooks and the optimizer, which hold them, are not affected.
            for name, parameter in self._parameters.items():
                storage(parameter).data = self._copies[name].to(originals[name].dtype)
                forget_second_set(parameter)
            yield
        finally:
            for name, parameter in self._parameters.items():
                storage(parameter).data = originals[name]
                forget_second_set(parameter)

    def move_towards_weights(self, share: float) -> None:
        """copy <- (1 - share) * copy + share * weights; share 1 copies them."""
        for name, weight in self._targets():
            copy = self._copies[name]
            copy.copy_(weight) if share == 1.0 else copy.lerp_(weight.to(copy.dtype), share)

    def _targets(self) -> Iterator[tuple[str, Tensor]]:
        """What each tensor of the copy moves towards."""
        for name, parameter in self._parameters.items():
            yield name, storage(parameter).detach()

    def save(self, folder: Path) -> None:
        """Write this rank's part of the copy."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = {name: self._piece(name, parameter, rank) for name, parameter in self._parameters.items()}
        pieces = [
            piece if is_sharded(self._parameters[name]) else piece.share(rank, ranks) for name, piece in own.items()
        ]
        write_pieces(shard_file(folder, COPY, rank), pieces)

    def load(self, folder: Path) -> None:
        """The inverse of `save`, whatever number of ranks wrote it and however they were sharded. Raises DataError when
        the files do not hold exactly this copy's tensors."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        with TensorShards(folder, COPY) as stored:
            refuse_other_weights(stored, {name: shape_of(parameter) for name, parameter in self._parameters.items()})
            for name, parameter in self._parameters.items():
                piece = self._piece(name, parameter, rank)
                piece.values.copy_(stored.read(name, piece.start, piece.stop))

    def _piece(self, name: str, parameter: nn.Parameter, rank: int) -> Piece:
        """What this rank holds of one tensor of the copy, without what fills shards up to equal parts."""
        flat, shape = self._copies[name].view(-1), shape_of(parameter)
        start = rank * flat.numel() if is_sharded(parameter) else 0
        return Piece(name, shape, start, flat[: max(0, prod(shape) - start)], parameter.dtype)


Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]
"""Makes sharded parameters whole on this rank for the length of a context."""


class UpdateCopy(WeightCopy):
    """A moving copy of what adapters add to their weights, scaling * B @ A, in fp32. Swapped in with the adapter off.

    An average of A and B is not an average of their product, so the product is averaged: one fp32 number for each
    weight that has an adapter. It stays apart from the weights and runs beside them: a sum in bf16 would round most of
    a small update away, and even one in fp32 the share by which an average moves.
    """

    def __init__(self, lm: PeftModel, gather: Gather) -> None:
        self._gather = gather
        self._layers = {f"{name}.update": layer for name, layer in adapted_layers(lm).items()}
        self._adapter = lm.active_adapter
        self._parameters = {name: weight_of(layer) for name, layer in self._layers.items()}
        self._copies = {
            name: torch.zeros_like(storage(weight).detach(), dtype=torch.float32)
            for name, weight in self._parameters.items()
        }
        self.move_towards_weights(1.0)

    def _targets(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in self._layers.items():
            down, up = layer.lora_A[self._adapter].weight, layer.lora_B[self._adapter].weight
            # No shard of the product can be had from shards of the factors. They are small; the base stays sharded.
            with self._gather([down, up]):
                update = update_of(layer)
            yield name, own_shard(update, self._parameters[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run with the copy beside the weights. Collective where they are sharded."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.enter_context(added_to(layer, partial(self._whole, name)))
            yield

    def _whole(self, name: str, like: Tensor) -> Tensor:
        """One update in the shape of its weight, in the type of `like` and on its device."""
        copy, weight = self._copies[name].to(like.device, like.dtype), self._parameters[name]
        if not is_sharded(weight):
            return copy
        flat = copy.new_empty(dist.get_world_size() * copy.numel())
        dist.all_gather_into_tensor(flat, copy.flatten())
        return flat[: weight.ds_numel].view(weight.ds_shape)


@contextmanager
def added_to(layer: LoraLayer, update: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have a layer whose adapter is off add another update to its weight: `update` gives it like a tensor."""
    if isinstance(layer, WideAdapter):
        layer.stand_in = lambda: update(torch.empty(0, device=layer.get_param().device))
        try:
            yield
        finally:
            layer.stand_in = None
        return

    def add(module: nn.Module, args: tuple[Tensor, ...], output_NE: Tensor) -> Tensor:
        weight = update(args[0])
        return output_NE + (args[0] @ weight if layer.fan_in_fan_out else nn.functional.linear(args[0], weight))

    handle = layer.get_base_layer().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def own_shard(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """What this rank stores of a tensor with the shape of `parameter`: all of it, or its slice, flattened and padded as
    ZeRO-3 does."""
    if not is_sharded(parameter):
        return tensor
    shard = storage(parameter)
    start = dist.get_rank() * shard.numel()
    # On the shard's device: the tensor comes from gathered parameters on the GPU, offloaded shards are on the CPU.
    padded = tensor.new_zeros(shard.numel(), device=shard.device)
    piece = tensor.flatten()[start : start + shard.numel()]
    padded[: piece.numel()] = piece
    return padded.view_as(shard)


def storage(parameter: nn.Parameter) -> Tensor:
    """What this rank stores of a parameter: its ZeRO-3 shard if it has one, else the parameter itself."""
    return parameter.ds_tensor if is_sharded(parameter) else parameter


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole weight, also where it is sharded."""
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)


def forget_second_set(parameter: nn.Parameter) -> None:
    """What a node's ranks hold of a parameter beside its shards (zero.hpz_ranks) is of the weights before they were
    swapped: it is made again from the shards by the next pass."""
    if is_sharded(parameter):
        parameter.ds_secondary_tensor = None


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """How many weights there are and how many of them are trained; the same number if they are sharded."""
    sizes = [(p.ds_numel if is_sharded(p) else size_of(p), p.requires_grad) for p in module.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trained in sizes if trained),
    }


def share_beyond_bfloat16(module: nn.Module, update: float) -> float:
    """Share of this rank's trained weights that are so large that bfloat16 rounds away a change by `update`: it is less
    than half the distance to the next number."""
    lost = total = 0
    for parameter in trainable(module).values():
        exponent = storage(parameter).detach().float().frexp().exponent
        # A weight in [2^(e-1), 2^e) has neighbours 2^(e-8) away. Nothing is too little for a zero.
        lost += int(((exponent - 9.0).exp2() > update).logical_and(storage(parameter).detach() != 0).sum())
        total += exponent.numel()
    return lost / max(1, total)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed has partitioned this parameter (it marks those it has with an id)."""
    return "ds_tensor" in parameter.__dict__
