"""Where the weights of a model that is sharded are whole: until then on the card where that has room, else in their
files, mapped into memory, of which a machine holds one copy for all its ranks; afterwards, to draw completions, on the
card where that has room, else never."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from opsd_cli.engine.device import free_bytes
from opsd_cli.engine.process_group import Ranks

CPU = torch.device("cpu")
ROOM = 0.9  # of what is free on a card, for weights: the passes of the checks at load take the rest
ROOM_TO_DRAW = 0.8  # of what is free beside shards and optimizer, for weights: the cache takes the rest


def home_of(causal: nn.Module, device: torch.device, ranks: Ranks) -> torch.device:
    """Where all ranks check the weights of `causal`, loaded on the CPU, before these are sharded: on their devices, or
    on the CPU where one of these cannot hold the whole. Collective."""
    return CPU if ranks.any(not has_room(causal, device)) else device


def why_by_layer(asked: str, parameters: Iterable[nn.Parameter], device: torch.device, ranks: Ranks) -> str:
    """Why completions are drawn with weights that are gathered a layer at a time, in words; empty where all are whole
    meanwhile. `asked` is the setting `zero.gather`. Collective."""
    if asked != "auto":
        return f"zero.gather={asked}" if asked == "layer" else ""
    if device.type == "cpu":
        return ""  # what a host has free says little: other ranks share it, and it can swap
    needed, free = whole_bytes(parameters), free_bytes(device)
    sizes = f"all {needed / 2**30:.1f} GiB of them do not fit into the {free / 2**30:.1f} GiB that are free"
    return ranks.refusal("" if needed <= ROOM_TO_DRAW * free else sizes)


def whole_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Of parameters that may be shards now."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size() for parameter in parameters)


def has_room(causal: nn.Module, device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return whole_bytes(causal.parameters()) <= ROOM * free


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """The buffers alone: a model whose weights are sharded needs them whole."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.to(device)
