"""What the student's pass keeps for its backward pass, in host memory meanwhile: with checkpointing the input of every
layer, which a long rollout fills a small card with.

Apart from torch's own `save_on_cpu`, which waits for the card at every tensor and moves small ones too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**16  # numbers; a tensor of fewer stays, such as a norm's gain


@dataclass(frozen=True)
class InHostMemory:
    """A tensor that was moved, and where it belongs."""

    copy: Tensor
    device: torch.device


class OffloadActivations(saved_tensors_hooks):
    """While it is open, autograd keeps what it saves in host memory: page-locked where it comes from a card, so that
    neither way makes the host wait. What lies inside a checkpoint is computed again and never comes here."""

    def __init__(self) -> None:
        super().__init__(put_away, fetch)


def put_away(tensor: Tensor) -> Tensor | InHostMemory:
    if tensor.numel() < SMALLEST or not tensor.is_floating_point():
        return tensor
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    # Copies of one stream keep their order, so the card's memory may be used again at once; the allocator of
    # page-locked memory waits for the copy by itself before it gives this one to another.
    return InHostMemory(copy.copy_(tensor, non_blocking=True), tensor.device)


def fetch(kept: Tensor | InHostMemory) -> Tensor:
    return kept.copy.to(kept.device, non_blocking=True) if isinstance(kept, InHostMemory) else kept
