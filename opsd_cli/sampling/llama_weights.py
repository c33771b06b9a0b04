"""The weights of a decoder of the Llama family, laid out for generation: which architectures are known, how projections
of the same input become one matrix, and how an adapter or the gain of a norm gets into it. Nothing here runs a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from opsd_cli.cpu.matmul import add_linear, linear
from opsd_cli.engine.loading import causal_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROTARY = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone
FUSED_BYTES = 512 * 2**20  # of copies (fused projections, merged adapters); above it the weights are used as they are


@dataclass(frozen=True)
class TorchNorm:
    """The root-mean-square norm by torch: one kernel on a GPU. The weight is [size], or [heads, size] where the heads
    of x have weights of their own."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape[-1:], None, self.eps) * self.weight


@dataclass(frozen=True)
class LengthNorm:
    """The same as x / sqrt(|x|^2 + size * eps) * gain, with gain = weight * sqrt(size)."""

    gain: Tensor | None  # None: it is in the projection that follows
    floor: Tensor  # sqrt(size * eps)

    def __call__(self, x: Tensor) -> Tensor:
        unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)
        return unit if self.gain is None else unit.mul_(self.gain)


Norm = TorchNorm | LengthNorm


def make_norm(weight: Tensor, eps: float) -> Norm:
    # On a CPU torch takes seven operations of some microseconds each; the length of x takes three.
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return TorchNorm(weight, eps)
    size = weight.shape[-1]
    return LengthNorm(weight * size**0.5, weight.new_tensor((size * eps) ** 0.5))


@dataclass(frozen=True)
class Projection:
    """Linear maps of one input, outputs side by side: one matrix once they are fused, else one after the other."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    low_rank: tuple[tuple[Tensor, Tensor] | None, ...]  # down [r, in] and scaled up [out, r] of an adapter

    def __call__(self, x_ND: Tensor) -> Tensor:
        outputs = []
        for weight, bias, pair in zip(self.weights, self.biases, self.low_rank, strict=True):
            output = linear(x_ND, weight, bias)
            outputs.append(output if pair is None else output.addmm_(x_ND @ pair[0].t(), pair[1].t()))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def add_to(self, total_NM: Tensor, x_NK: Tensor) -> Tensor:
        """`total` plus the map of x, in place."""
        if len(self.weights) > 1 or self.low_rank[0] is not None:
            return total_NM.add_(self(x_NK))
        add_linear(total_NM, x_NK, self.weights[0], self.biases[0])
        return total_NM

    def scale_input(self, gain_D: Tensor) -> Projection:
        """The map of the input times `gain_D`, as a copy. Adapters are merged by then."""
        assert all(pair is None for pair in self.low_rank), "an adapter would be given the input without the gain"
        return replace(self, weights=tuple(weight * gain_D for weight in self.weights))

    @property
    def bytes_if_fused(self) -> int:
        """What the copy takes; nothing where there is only one matrix and no adapter."""
        if len(self.weights) == 1 and self.low_rank[0] is None:
            return 0
        return sum(weight.numel() * weight.element_size() for weight in self.weights)

    def fuse(self) -> Projection:
        """The same map as one matrix, adapters merged, or in half precision as one matrix and one adapter."""
        if self.bytes_if_fused == 0:
            return self
        # In half precision most of a small update would be rounded away beside its weight, and completions would be
        # those of other weights than the loss sees.
        merges = self.weights[0].dtype.itemsize >= torch.float32.itemsize
        weights = [
            weight if pair is None or not merges else weight + pair[1] @ pair[0]
            for weight, pair in zip(self.weights, self.low_rank, strict=True)
        ]
        biases = [
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(weights, self.biases, strict=True)
        ]
        bias = None if all(bias is None for bias in self.biases) else torch.cat(biases)
        return Projection((torch.cat(weights),), (bias,), (None if merges else self._joint_adapter(),))

    def _joint_adapter(self) -> tuple[Tensor, Tensor] | None:
        """One adapter for outputs that stand side by side: its up matrix holds theirs along the diagonal."""
        if all(pair is None for pair in self.low_rank):
            return None
        down, up = zip(
            *(
                (weight.new_zeros(0, weight.shape[1]), weight.new_zeros(len(weight), 0)) if pair is None else pair
                for weight, pair in zip(self.weights, self.low_rank, strict=True)
            ),
            strict=True,
        )
        return torch.cat(down), torch.block_diag(*up)


def absorb_gain(norm: Norm, projection: Projection) -> tuple[Norm, Projection]:
    """The same two with the norm's gain in the projection, if the norm keeps it apart: one operation less a layer."""
    if not isinstance(norm, LengthNorm) or norm.gain is None:
        return norm, projection
    return replace(norm, gain=None), projection.scale_input(norm.gain)


@dataclass(frozen=True)
class Layer:
    """The weights of one decoder layer."""

    input_norm: Norm
    query_key_value: Projection
    head_norm: Norm | None  # of queries and keys
    output: Projection
    mlp_norm: Norm
    gate_up: Projection
    down: Projection

    @property
    def bytes_if_fused(self) -> int:
        return sum(part.bytes_if_fused for part in (self.query_key_value, self.output, self.gate_up, self.down))

    def fuse(self) -> Layer:
        input_norm, query_key_value = absorb_gain(self.input_norm, self.query_key_value.fuse())
        mlp_norm, gate_up = absorb_gain(self.mlp_norm, self.gate_up.fuse())
        return replace(
            self,
            input_norm=input_norm, query_key_value=query_key_value, output=self.output.fuse(),
            mlp_norm=mlp_norm, gate_up=gate_up, down=self.down.fuse(),
        )  # fmt: skip


def supports(lm: nn.Module) -> bool:
    """Whether this file knows the architecture: its family, full attention everywhere, plain linear maps or LoRA."""
    causal = causal_of(lm)
    config = causal.config.to_dict()
    rope = config.get("rope_parameters") or {}
    kinds = set(config.get("layer_types") or ["full_attention"])
    windowed = config["model_type"] == "mistral" and config.get("sliding_window") is not None
    if config["model_type"] not in FAMILIES or windowed or kinds != {"full_attention"}:
        return False
    if config.get("hidden_act") != "silu" or rope.get("rope_type") not in ROTARY:
        return False
    linears = [causal.lm_head]
    for layer in causal.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    # The exact type: a subclass, such as a quantised map, computes something else from its weight.
    return all(type(module) is nn.Linear or _is_plain_lora(module) for module in linears)


def _is_plain_lora(module: nn.Module) -> bool:
    return (
        isinstance(module, LoraLayer)
        and type(module.base_layer) is nn.Linear
        and len(module.active_adapters) == 1
        and not module.merged
        and not module.lora_variant
        and not any(module.lora_bias.values())
    )


def layers_of(causal: Any) -> list[Layer]:
    """The weights of every layer as they are now: fused copies where they are small, else the weights themselves."""
    layers = [_layer(module) for module in causal.model.layers]
    if sum(layer.bytes_if_fused for layer in layers) > FUSED_BYTES:
        return layers
    return [layer.fuse() for layer in layers]


def _layer(module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    input_norm, mlp_norm = module.input_layernorm, module.post_attention_layernorm
    config, head_norm = attention.config, None
    if config.model_type == "qwen3":
        # Queries and keys stand side by side as heads: one norm for both, with each head's weight repeated.
        query = attention.q_norm.weight.expand(config.num_attention_heads, -1)
        weight = torch.cat([query, attention.k_norm.weight.expand(config.num_key_value_heads, -1)])
        head_norm = make_norm(weight, attention.q_norm.variance_epsilon)
    return Layer(
        input_norm=make_norm(input_norm.weight, input_norm.variance_epsilon),
        query_key_value=projection_of(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norm=head_norm,
        output=projection_of(attention.o_proj),
        mlp_norm=make_norm(mlp_norm.weight, mlp_norm.variance_epsilon),
        gate_up=projection_of(mlp.gate_proj, mlp.up_proj),
        down=projection_of(mlp.down_proj),
    )


def projection_of(*modules: nn.Module) -> Projection:
    """Linear modules that read the same input, with their adapters as they are in force."""
    bases = [module.base_layer if isinstance(module, LoraLayer) else module for module in modules]
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for module in modules:
        if not isinstance(module, LoraLayer) or module.disable_adapters:
            pairs.append(None)
            continue
        name = module.active_adapters[0]
        up = module.lora_B[name].weight * module.scaling[name]
        dtype = module.base_layer.weight.dtype
        pairs.append((module.lora_A[name].weight.to(dtype), up.to(dtype)))
    return Projection(tuple(base.weight for base in bases), tuple(base.bias for base in bases), tuple(pairs))
