"""Where a model's weights are until a run shards them: whole on the card where that has room, else in their files,
mapped into memory, of which a machine holds one copy for all its ranks."""

from __future__ import annotations

import torch
from torch import nn

from opsd_cli.engine.process_group import Ranks

CPU = torch.device("cpu")
ROOM = 0.9  # of what is free on a card, for weights: the passes of the checks at load take the rest


def home_of(causal: nn.Module, device: torch.device, ranks: Ranks) -> torch.device:
    """Where all ranks check the weights of `causal`, loaded on the CPU, before these are sharded: on their devices, or
    on the CPU where one of these cannot hold the whole. Collective."""
    return CPU if ranks.any(not has_room(causal, device)) else device


def has_room(causal: nn.Module, device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return weight_bytes(causal) <= ROOM * free


def weight_bytes(causal: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in causal.parameters())


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """The buffers alone: a model whose weights are sharded needs them whole."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.to(device)
