"""Copies of the trainable weights (the initial teacher of full fine-tuning, moving averages) and adapters merged into
the weights they act on.

A copy is held the way its parameter is: whole for ZeRO stages 0 to 2, this rank's shard for stage 3. Everything here
works element by element, so nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.errors import DataError


class WeightCopy:
    """A copy of some parameters, in fp32 where it moves and in the parameter's type where not."""

    def __init__(self, parameters: dict[str, nn.Parameter], *, moves: bool) -> None:
        self._parameters = parameters
        dtype = torch.float32 if moves else None  # a bf16 average would lose small increments to rounding
        self._held = {
            name: storage(p).detach().to(dtype=dtype or storage(p).dtype, copy=True)
            for name, p in self._parameters.items()
        }

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run with the copy in place of the weights. Pointers move, nothing is copied unless the types differ."""
        originals = {name: storage(p).data for name, p in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                storage(parameter).data = self._held[name].to(originals[name].dtype)
            yield
        finally:
            for name, parameter in self._parameters.items():
                storage(parameter).data = originals[name]

    def move_towards_weights(self, share: float) -> None:
        """copy <- (1 - share) * copy + share * weights; share 1 copies them."""
        for name, current in self._current():
            held = self._held[name]
            held.copy_(current) if share == 1.0 else held.lerp_(current.to(held.dtype), share)

    def _current(self) -> Iterator[tuple[str, Tensor]]:
        """What the copy moves towards, by name."""
        for name, parameter in self._parameters.items():
            yield name, storage(parameter).detach()

    def save(self, file: Path) -> None:
        reach("save.file")
        save_file({name: held.contiguous().cpu() for name, held in self._held.items()}, file)

    def load(self, file: Path) -> None:
        """Raises DataError when the file does not hold exactly this copy's tensors."""
        stored = load_file(file)
        if stored.keys() != self._held.keys():
            raise DataError(f"{file} does not hold the weights of this model; it was written by another run")
        for name, held in self._held.items():
            held.copy_(stored[name])


Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]
"""Makes sharded parameters whole on this rank for the length of a context."""


class MergedCopy(WeightCopy):
    """A moving copy of a model under LoRA, held where the adapter acts: in the base weights, W + scaling * B @ A.

    An average of A and B is not an average of their product, so the product is what is averaged. It takes one fp32
    number for each weight that has an adapter, and is used with the adapter off.
    """

    def __init__(self, lm: PeftModel, gather: Gather) -> None:
        self._gather = gather
        self._layers = {
            name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer) and module.lora_A
        }
        self._adapter = lm.active_adapter
        super().__init__({name: layer.base_layer.weight for name, layer in self._layers.items()}, moves=True)
        self.move_towards_weights(1.0)

    def _current(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in self._layers.items():
            down, up = layer.lora_A[self._adapter].weight, layer.lora_B[self._adapter].weight
            with self._gather([down, up]):
                update = layer.scaling[self._adapter] * (up.detach().float() @ down.detach().float())
            base = self._parameters[name]
            yield name, storage(base).detach().float() + own_shard(update, base)


def merged(lm: PeftModel, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base model's own parameter names with W + scaling * B @ A, computed in fp32."""
    adapter = lm.active_adapter
    prefix = "base_model.model."
    plain: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if ".lora_" in name:
            continue
        if not name.endswith(".base_layer.weight"):
            plain[name.removeprefix(prefix).replace(".base_layer.", ".")] = tensor
            continue
        path = name.removesuffix(".base_layer.weight")
        layer: Any = lm.get_submodule(path)
        up, down = (whole[f"{path}.lora_{side}.{adapter}.weight"].float() for side in "BA")
        update = layer.scaling[adapter] * (up @ down)
        plain[f"{path.removeprefix(prefix)}.weight"] = (tensor.float() + update).to(tensor.dtype)
    return plain


def merged_parameters(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a whole model under its plain names, an adapter merged, one at a time."""
    whole = {name: parameter.data for name, parameter in lm.named_parameters()}
    if not isinstance(lm, PeftModel):
        yield from whole.items()
        return
    for name in (name for name in whole if ".lora_" not in name):
        path = name.removesuffix("base_layer.weight")
        parts = {part: whole[part] for part in whole if part == name or part.startswith(f"{path}lora_")}
        yield from merged(lm, parts).items()


def own_shard(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a tensor that is like `parameter`: all of it, or a slice of it, flattened and padded, on
    the device of its shard. Parameters that were gathered are on the GPU; the shards of offloaded ones are not."""
    if not is_sharded(parameter):
        return whole
    shard = storage(parameter)
    start = dist.get_rank() * shard.numel()
    padded = whole.new_zeros(shard.numel(), device=shard.device)
    piece = whole.flatten()[start : start + shard.numel()]
    padded[: piece.numel()] = piece
    return padded.view_as(shard)


def storage(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its ZeRO-3 shard where it has one, else the parameter itself."""
    return parameter.ds_tensor if is_sharded(parameter) else parameter


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """How many weights there are and how many of them are trained, whole or sharded."""
    sizes = [(p.ds_numel if is_sharded(p) else p.numel(), p.requires_grad) for p in module.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trained in sizes if trained),
    }


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed has partitioned this parameter (it marks those it has with an id)."""
    return "ds_tensor" in parameter.__dict__
