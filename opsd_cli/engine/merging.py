"""Adapters merged into the weights they act on, by peft's own merge: one layer at a time, in fp32, rounded once.

In half precision most of a small update is lost when it is rounded to the weights it is added to, so `kept_share`
measures how much of it a format keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.memory_errors import is_out_of_memory

PREFIX = "base_model.model."  # what peft puts in front of every name
EXACT = 1e-3  # of the norm, how far a merged layer may be from an adapted one in fp32


def adapted_layers(lm: nn.Module) -> dict[str, LoraLayer]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer) and module.lora_A}


def weight_of(layer: LoraLayer) -> nn.Parameter:
    """The weight that an adapter is added to."""
    weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    assert isinstance(weight, nn.Parameter)
    return weight


def update_of(layer: LoraLayer) -> Tensor:
    """What an adapter adds to its weight, in its shape: scaling * B @ A, in fp32 where the weight allows it."""
    with _wide_factors(layer):
        return layer.get_delta_weight(layer.active_adapters[0]).float()


def merged_weight(layer: LoraLayer) -> Tensor:
    """The weight of a layer with its adapter merged, in fp32. The layer stays as it was."""
    weight = weight_of(layer)
    held = weight.data
    with _wide_factors(layer):
        weight.data = held.float()
        try:
            layer.merge(safe_merge=True)
            return weight.data
        finally:
            weight.data = held
            layer.merged_adapters.clear()


def merged_parameters(lm: nn.Module, *, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `lm`, whole, under the names of the model without an adapter and in its own type; with `only`,
    those of these names in `lm`, which may have no others."""
    layers = {id(weight_of(layer)): layer for layer in adapted_layers(lm).values()}
    for name, parameter in lm.named_parameters():
        if ".lora_" in name or (only is not None and name not in only):
            continue
        layer = layers.get(id(parameter))
        merged = parameter.data if layer is None else merged_weight(layer).to(parameter.dtype)
        yield plain_name(name), merged


def plain_name(name: str) -> str:
    """A parameter's name in the model without an adapter."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def kept_share(lm: nn.Module, dtype: torch.dtype) -> float:
    """How much of the adapters' update the merged weights hold in that format: the part of what is added that goes in
    the update's direction. 1 where nothing is lost, and where there is no update."""
    kept = whole = 0.0
    for layer in adapted_layers(lm).values():
        base = weight_of(layer).data.float()
        merged = merged_weight(layer)
        update = merged - base
        kept += float((update * (merged.to(dtype).float() - base)).sum())
        whole += float(update.square().sum())
    return kept / whole if whole else 1.0


def merge(lm: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its adapters, which are merged into its weights; everything in `dtype`. `lm` is used up."""
    for layer in adapted_layers(lm).values():
        weight_of(layer).data = merged_weight(layer).to(dtype)
    return lm.unload().to(dtype)


def rehearse_merge(lm: nn.Module) -> None:
    """Merge one layer of each kind with random factors, before anything is trained. Raises ConfigError where that
    cannot be done, or does not compute what the adapter does."""
    tried = set()
    for name, layer in adapted_layers(lm).items():
        kind = (type(layer), type(layer.get_base_layer()), weight_of(layer).shape)
        if kind in tried:
            continue
        tried.add(kind)
        if problem := _try_merge(layer):
            raise ConfigError(
                f"the adapter of {plain_name(name)} ({kind[1].__name__}) cannot be merged, so model/ could not be "
                f"written: {problem}; leave it out of lora.targets, or use lora=none"
            )


@torch.no_grad()
def _try_merge(layer: LoraLayer) -> str:
    """What goes wrong, in words."""
    if not isinstance(layer, Linear | ParamWrapper):
        return f"it is a {type(layer).__name__}, of which opsd does not know whether a merge is exact"
    trial = copy.deepcopy(layer).float().eval()
    generator = torch.Generator().manual_seed(0)
    for factor in trial.lora_B.parameters():
        factor.copy_(torch.randn(factor.shape, generator=generator))
    try:
        if isinstance(trial, ParamWrapper):
            merged_weight(trial)  # what calls it differs between architectures: compared at the end, on the whole model
            return ""
        states_nD = torch.randn(3, trial.in_features, generator=generator).to(weight_of(trial).device)
        adapted_nE = trial(states_nD)
        weight_of(trial).data = merged_weight(trial)
        merged_nE = trial.get_base_layer()(states_nD)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    apart = float((merged_nE - adapted_nE).norm() / adapted_nE.norm())
    return "" if apart <= EXACT else f"merged it deviates by {100 * apart:.3g} %"


@contextmanager
def _wide_factors(layer: LoraLayer) -> Iterator[None]:
    """The factors of an adapter in fp32, in which peft multiplies them."""
    factors = [parameter for side in (layer.lora_A, layer.lora_B) for parameter in side.parameters()]
    held = [parameter.data for parameter in factors]
    for parameter in factors:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, data in zip(factors, held, strict=True):
            parameter.data = data
