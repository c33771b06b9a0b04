"""Copies of the trainable weights (the initial teacher of full fine-tuning, moving averages). Owns how a copy is held,
moved, swapped in for a forward, and put on disk. Does not know which teacher uses it.

A copy is held the way its parameter is: whole for ZeRO stages 0 to 2, this rank's shard for stage 3. Everything here
works element by element, so nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opsd_cli.settings.errors import DataError


class WeightCopy:
    """A copy of every trainable parameter of a module, in fp32 where it moves and in the parameter's type where not."""

    def __init__(self, module: nn.Module, *, moves: bool) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
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
        for name, parameter in self._parameters.items():
            current = storage(parameter).detach()
            if share == 1.0:
                self._held[name].copy_(current)
            else:
                self._held[name].lerp_(current.to(self._held[name].dtype), share)

    def save(self, file: Path) -> None:
        save_file({name: held.contiguous().cpu() for name, held in self._held.items()}, file)

    def load(self, file: Path) -> None:
        """Raises DataError when the file does not hold exactly this copy's tensors."""
        stored = load_file(file)
        if stored.keys() != self._held.keys():
            raise DataError(f"{file} does not hold the weights of this model; it was written by another run")
        for name, held in self._held.items():
            held.copy_(stored[name])


def storage(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its ZeRO-3 shard where it has one, else the parameter itself."""
    return parameter.ds_tensor if is_sharded(parameter) else parameter


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed has partitioned this parameter (it marks those it has with an id)."""
    return "ds_tensor" in parameter.__dict__
