"""The weights of a decoder of the Llama family as a captured graph reads them: at addresses that stay. A graph holds
addresses, not tensors, so whatever an update writes in place it reads at once.

Most are the very parameters that the engine updates. The others are copies that keep their address and are made again
before each use: projections of one input as one matrix where that is small, the factors of an adapter, and, where the
engine gathers its parameters anew each time (ZeRO-3), everything. An adapter is never merged: its update is small
beside the weight and would be rounded away in half precision, and the loss does not merge it either.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opsd_cli.engine.loading import causal_of
from opsd_cli.sampling.graphs import Branch
from opsd_cli.sampling.llama_weights import FUSED_BYTES, projection_of


@dataclass(frozen=True)
class LinearMaps:
    """Linear maps of one input, their outputs side by side."""

    weights: tuple[Tensor, ...]  # [out, in] of each, or all in one
    biases: tuple[Tensor | None, ...]
    down_rK: Tensor | None  # the first factors of the adapters, one below the other
    up_Mr: Tensor | None  # their second factors times their scale: a block for each map, zero beside it

    def __call__(self, x_NK: Tensor, branch: Branch | None = None) -> Tensor:
        """The outputs of x [N, M]. With a branch the first product of the adapters runs beside that of the weights."""
        low_Nr = self._start_adapters(x_NK, branch)
        sizes = [len(weight) for weight in self.weights]
        out_NM = x_NK.new_empty(len(x_NK), sum(sizes))
        for weight, bias, part in zip(self.weights, self.biases, out_NM.split(sizes, dim=1), strict=True):
            if bias is None:
                torch.mm(x_NK, weight.t(), out=part)
            else:
                torch.addmm(bias, x_NK, weight.t(), out=part)
        return self._finish_adapters(out_NM, low_Nr, branch)

    def add_to(self, total_NM: Tensor, x_NK: Tensor, branch: Branch | None = None) -> Tensor:
        """`total` plus the one map of x, in place."""
        low_Nr = self._start_adapters(x_NK, branch)
        (weight,), (bias,) = self.weights, self.biases
        total_NM.addmm_(x_NK, weight.t())
        return self._finish_adapters(total_NM if bias is None else total_NM.add_(bias), low_Nr, branch)

    def _start_adapters(self, x_NK: Tensor, branch: Branch | None) -> Tensor | None:
        if self.down_rK is None:
            return None
        with nullcontext() if branch is None else branch.fork():
            return x_NK @ self.down_rK.t()

    def _finish_adapters(self, out_NM: Tensor, low_Nr: Tensor | None, branch: Branch | None) -> Tensor:
        if low_Nr is None or self.up_Mr is None:
            return out_NM
        if branch is not None:
            branch.join()
        return out_NM.addmm_(low_Nr, self.up_Mr.t())

    @property
    def bytes_if_fused(self) -> int:
        """What one matrix of them all takes; nothing where there is only one."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights) * (len(self.weights) > 1)

    def fuse(self) -> LinearMaps:
        """The same maps as one matrix."""
        bias = None
        if any(bias is not None for bias in self.biases):
            pairs = zip(self.weights, self.biases, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if own is None else own for w, own in pairs])
        return replace(self, weights=(torch.cat(self.weights),), biases=(bias,)) if len(self.weights) > 1 else self


@dataclass(frozen=True)
class LiveLayer:
    """The weights of one decoder layer."""

    input_norm: Tensor
    query_key_value: LinearMaps
    head_gains: tuple[Tensor, Tensor] | None  # of queries and keys, if the model norms heads
    output: LinearMaps
    mlp_norm: Tensor
    gate_up: LinearMaps
    down: LinearMaps


@dataclass(frozen=True)
class LiveModel:
    """All weights that generation reads."""

    embedding: Tensor
    layers: tuple[LiveLayer, ...]
    final_norm: Tensor
    head: LinearMaps


class LiveWeights:
    """The weights of `lm`, and whether they can be read again after an update. `lent` says that the engine keeps its
    parameters where they are; otherwise everything is copied."""

    @torch.inference_mode()
    def __init__(self, lm: nn.Module, *, lent: bool, fused_bytes: int = FUSED_BYTES) -> None:
        self._fused_bytes = fused_bytes
        parameters = {parameter.data_ptr() for parameter in lm.parameters()}
        copies: dict[int, Tensor] = {}  # by the address of the original: tied weights stay one
        self._made: set[int] = set()

        def held(tensor: Tensor) -> Tensor:
            if lent and tensor.data_ptr() in parameters:
                return tensor.detach()
            if tensor.data_ptr() not in copies:
                copies[tensor.data_ptr()] = tensor.clone() if tensor.data_ptr() in parameters else tensor
            self._made.add(copies[tensor.data_ptr()].data_ptr())
            return copies[tensor.data_ptr()]

        now = read_model(lm, fused_bytes)
        self.model: LiveModel = map_tensors(held, now)
        self.copied_bytes = sum(copy.numel() * copy.element_size() for copy in copies.values())

    @torch.inference_mode()
    def refresh(self, lm: nn.Module) -> bool:
        """Make the copies again from `lm` as it is now. False where it is not laid out as it was (a parameter at
        another address, an adapter switched off): these weights cannot be used again."""
        now, held = (tensors_of(model) for model in (read_model(lm, self._fused_bytes), self.model))
        if [(t.shape, t.dtype) for t in now] != [(t.shape, t.dtype) for t in held]:
            return False
        stray = [own for own, new in zip(held, now, strict=True) if own.data_ptr() not in self._made and
                 own.data_ptr() != new.data_ptr()]  # fmt: skip
        if stray:
            return False
        done: set[int] = set()
        for own, new in zip(held, now, strict=True):
            if own.data_ptr() in self._made and own.data_ptr() not in done:
                own.copy_(new)
                done.add(own.data_ptr())
        return True


def read_model(lm: nn.Module, fused_bytes: int) -> LiveModel:
    """The weights as they are now: parameters as they are, the rest made of them."""
    causal = causal_of(lm)
    layers = [_layer(module) for module in causal.model.layers]
    # Those of attention first: a product with a few megabytes takes as long as one with several times as many.
    bytes_of_attention = sum(layer.query_key_value.bytes_if_fused for layer in layers)
    if bytes_of_attention <= fused_bytes:
        layers = [replace(layer, query_key_value=layer.query_key_value.fuse()) for layer in layers]
    if bytes_of_attention + sum(layer.gate_up.bytes_if_fused for layer in layers) <= fused_bytes:
        layers = [replace(layer, gate_up=layer.gate_up.fuse()) for layer in layers]
    return LiveModel(
        causal.model.embed_tokens.weight, tuple(layers), causal.model.norm.weight, linear_maps(causal.lm_head)
    )


def _layer(module: Any) -> LiveLayer:
    attention, mlp = module.self_attn, module.mlp
    has_gains = attention.config.model_type == "qwen3"
    return LiveLayer(
        input_norm=module.input_layernorm.weight,
        query_key_value=linear_maps(attention.q_proj, attention.k_proj, attention.v_proj),
        head_gains=(attention.q_norm.weight, attention.k_norm.weight) if has_gains else None,
        output=linear_maps(attention.o_proj),
        mlp_norm=module.post_attention_layernorm.weight,
        gate_up=linear_maps(mlp.gate_proj, mlp.up_proj),
        down=linear_maps(mlp.down_proj),
    )


def linear_maps(*modules: nn.Module) -> LinearMaps:
    """Linear modules that read the same input, with their adapters as they are in force."""
    parts = projection_of(*modules)
    pairs = [pair for pair in parts.low_rank if pair is not None]
    if not pairs:
        return LinearMaps(parts.weights, parts.biases, None, None)
    up_Mr = pairs[0][1].new_zeros(sum(map(len, parts.weights)), sum(len(down) for down, _ in pairs))
    row = column = 0
    for weight, pair in zip(parts.weights, parts.low_rank, strict=True):
        if pair is not None:
            rank = len(pair[0])
            up_Mr[row : row + len(weight), column : column + rank] = pair[1]
            column += rank
        row += len(weight)
    return LinearMaps(parts.weights, parts.biases, torch.cat([down for down, _ in pairs]), up_Mr)


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree of dataclasses and tuples with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple):
        return tuple(map_tensors(change, part) for part in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: map_tensors(change, getattr(tree, f.name)) for f in fields(tree)})
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Its tensors, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return found
