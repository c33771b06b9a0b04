"""What lets a long rollout train on a small card: MLPs that take the tokens of a micro-batch in pieces, one after
another, so that what lies between their projections, some times as wide as the hidden states, is there for one piece
only; and what the student's pass keeps for its backward pass, in host memory meanwhile.

Pieces instead of DeepSpeed's `TiledMLP`, which wants the formula and the weights of each architecture's MLP again: any
module whose output for a token depends on that token alone can be cut, and whether it does is tried. Our own hooks
instead of torch's `save_on_cpu`, which waits for the card at every tensor and moves small ones too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opsd_cli.engine.agreement import LAYER_LIMITS, describe, deviation
from opsd_cli.engine.weight_copies import is_sharded
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.memory_errors import is_out_of_memory

NAMES = ("mlp", "mlp_block", "feed_forward", "ffn", "block_sparse_moe")
"""What architectures call the part of a layer that follows attention."""
TRIED_TOKENS = 16

SMALLEST = 2**16
"""Numbers; a saved tensor of fewer stays on the card, such as a norm's gain."""


def tile_mlps(causal: PreTrainedModel, tiles: int) -> int:
    """Have every MLP of `causal` take its tokens in so many pieces, in place; returns how many there are. Raises
    ConfigError where one cannot be cut."""
    layers = [module for module in causal.modules() if isinstance(module, GradientCheckpointingLayer)]
    found = [module for layer in layers for name, module in layer.named_children() if name in NAMES]
    kind = causal.config.model_type
    if not found:
        raise ConfigError(
            f"train.mlp_tiles is {tiles}, but this architecture ({kind}) has no MLP of its own in a layer (known "
            f"names: {', '.join(NAMES)}); use train.mlp_tiles=1"
        )
    width = causal.config.get_text_config(decoder=True).hidden_size
    # Of each class one: the first layers of a mixture of experts may have MLPs of another kind.
    for one in {type(module): module for module in found}.values():
        if reason := why_not_cut(one, width, dtype=causal.dtype):
            raise ConfigError(
                f"train.mlp_tiles is {tiles}, but the MLPs of this architecture ({kind}) cannot be cut: {reason}; use "
                "train.mlp_tiles=1"
            )
    for module in found:
        # An attribute of the module, so that names, hooks and adapters stay where they are.
        module.forward = partial(in_tiles, module.forward, module, tiles)
    return len(found)


def untile_mlps(lm: nn.Module) -> None:
    """Undo `tile_mlps`: in a copy that generates, a token at a time."""
    for module in lm.modules():
        own = vars(module).get("forward")
        if isinstance(own, partial) and own.func is in_tiles:
            del module.forward


def in_tiles(forward: Callable[[Tensor], Tensor], module: nn.Module, tiles: int, hidden: Tensor) -> Tensor:
    """`forward` of tokens [..., D] in pieces of about the same size, each computed again in the backward pass."""
    tokens_LD = hidden.reshape(-1, hidden.shape[-1])
    # Sharded weights are gathered for each piece, by all ranks: all must have as many, though they have other lengths.
    must_agree = any(is_sharded(parameter) for parameter in module.parameters())
    pieces = tokens_LD.tensor_split(tiles if must_agree else max(1, min(tiles, len(tokens_LD))))
    if torch.is_grad_enabled():
        made = [checkpoint(forward, piece.unsqueeze(0), use_reentrant=False) for piece in pieces]
    else:
        made = [forward(piece.unsqueeze(0)) for piece in pieces]
    return torch.cat(made, dim=1).view(hidden.shape)


@torch.no_grad()
def why_not_cut(module: nn.Module, width: int, *, dtype: torch.dtype = torch.float32) -> str:
    """Why a module, which must be in evaluation mode, may not take tokens piece by piece, in words; empty where it may.
    Its output for a token must not change with what other tokens hold, nor with where it is cut."""
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    # In the type of the model's states: packed weights in 4 bits have another.
    tokens_1LD = torch.randn(1, TRIED_TOKENS, width, generator=generator).to(device, dtype)
    others_1LD = torch.cat([tokens_1LD[:, ::2], -tokens_1LD[:, 1::2]], dim=1)
    try:
        whole, beside_others = module(tokens_1LD), module(others_1LD)
        if not isinstance(whole, Tensor) or whole.shape != tokens_1LD.shape:
            return "they return more than one number for each they are given"
        first = module(tokens_1LD[:, : TRIED_TOKENS // 2])
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return f"they take more than hidden states ({str(error).strip().partition(chr(10))[0]})"
    half = TRIED_TOKENS // 2
    pairs = ((beside_others[:, :half], whole[:, ::2]), (first, whole[:, :half]))
    limit = LAYER_LIMITS[dtype]
    # The median token: of experts that are chosen, rounding may choose another one for a token.
    worst = max(deviation(found[0], right[0]).median() for found, right in pairs)
    if worst <= limit:
        return ""
    return f"what they give for a token depends on other tokens: it changes {describe(worst, limit)}"


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
