"""Adapters on parameters that belong to no linear layer: experts held as one tensor, routers.

peft adds such an adapter to the weight before the module runs. In half precision that sum rounds most of a small update
away, in the loss as in completions, so here module and sum are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.func import functional_call

HALF = (torch.bfloat16, torch.float16)


class WideAdapter(ParamWrapper):
    """peft's adapter of a parameter, added in float32. Several on one module wrap each other, and the outermost runs
    it."""

    stand_in: Callable[[], Tensor] | None = None
    """What is added in the place of the adapter's own update, in the shape of the weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        chain = list(self._chain())
        is_half = self.get_param().dtype in HALF
        if self.merged or not (is_half or any(adapter.stand_in for adapter in chain)):
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        # Also with the adapter off: teacher and student must differ by their weights, not by rounding.
        # By name: under ZeRO-3 asking a module for a parameter is what makes it whole.
        weights = {name: base.get_parameter(name).float() for name, _ in base.named_parameters()}
        weights |= {adapter.parameter_name: adapter._sum() for adapter in chain}
        wide = [cast(given, torch.float32, of=HALF) for given in (x, *args)]
        named = {name: cast(given, torch.float32, of=HALF) for name, given in kwargs.items()}
        return cast(functional_call(base, weights, tuple(wide), named), x.dtype, of=(torch.float32,))

    def _chain(self) -> Iterator[WideAdapter]:
        layer: nn.Module = self
        while isinstance(layer, WideAdapter):
            yield layer
            layer = layer.base_layer

    def _sum(self) -> Tensor:
        """The weight with what is added to it, in float32."""
        weight = self.get_param().float()
        if self.stand_in is not None:
            return weight + self.stand_in()
        if self.disable_adapters:
            return weight
        (adapter,) = self.active_adapters
        if self.num_experts == 1:
            return weight + self.get_delta_weight(adapter).float()
        left, right, scaling = self.get_delta_factors(adapter)
        return torch.baddbmm(weight, left.float(), right.float(), alpha=scaling)


def cast(value: Any, dtype: torch.dtype, *, of: tuple[torch.dtype, ...]) -> Any:
    """Tensors of the types `of`, also inside a tuple, in another type; everything else as it is."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype, of=of) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in of else value


def widen_adapters(lm: nn.Module) -> None:
    """Have the adapters of parameters computed in float32."""
    for module in lm.modules():
        if type(module) is ParamWrapper:
            # Not made as one from the start: peft knows its own adapters of parameters by the name of their class.
            module.__class__ = WideAdapter


def names_of_wide(lm: nn.Module) -> list[str]:
    """The parameters of no linear layer that have an adapter, each kind once."""
    adapted = {id(module.get_param()) for module in lm.modules() if isinstance(module, WideAdapter)}
    return sorted({short_name(name) for name, parameter in lm.named_parameters() if id(parameter) in adapted})


def adapters_in_words(lm: nn.Module) -> list[str]:
    """Which parameters that belong to no linear layer have an adapter, and which have none; nothing where there are
    only linear layers."""
    adapted = {id(module.get_param()): module for module in lm.modules() if isinstance(module, WideAdapter)}
    fused = [
        f"{name}.{key}"
        for name, module in lm.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2 and id(parameter) not in adapted and not isinstance(module, nn.Conv1d)
    ]
    lines = []
    if adapted:
        is_half = any(module.get_param().dtype in HALF for module in adapted.values())
        how = ", computed in float32, since half precision would round small updates away" if is_half else ""
        lines.append(f"lora: adapters also on {', '.join(names_of_wide(lm))}{how}")
    if fused:
        names = ", ".join(sorted({short_name(name) for name in fused}))
        lines.append(f"lora: no adapters on {names}: they are no linear layers, and stay as they are")
    return lines


def short_name(name: str) -> str:
    """The end of a parameter's name, which is the same in every layer."""
    return ".".join([part for part in name.split(".") if part != "base_layer"][-2:])
