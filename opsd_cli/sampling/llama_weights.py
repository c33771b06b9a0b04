"""The weights of a decoder of the Llama family, laid out for generation. Owns which architectures are known, how
projections that read the same input become one matrix, and how an adapter or the weight of a norm gets into it. Nothing
here runs a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from opsd_cli.cpu.matmul import add_linear, linear
from opsd_cli.sampling.llama_norm import LengthNorm, Norm, norm_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROTARY = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone
FUSED_BYTES = 512 * 2**20  # of copies: projections of one input in one matrix, adapters merged; above, neither is done


@dataclass(frozen=True)
class Projection:
    """Linear maps of one input, outputs side by side: one matrix where it may be a copy, else one after the other."""

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

    def of_scaled(self, gain_D: Tensor) -> Projection:
        """The map of the input times `gain_D`, as a copy."""
        return replace(self, weights=tuple(weight * gain_D for weight in self.weights))

    @property
    def bytes_if_fused(self) -> int:
        """What the copy takes; nothing where there is only one matrix and no adapter."""
        if len(self.weights) == 1 and self.low_rank[0] is None:
            return 0
        return sum(weight.numel() * weight.element_size() for weight in self.weights)

    def fused(self) -> Projection:
        """The same map as one matrix, adapters merged."""
        if self.bytes_if_fused == 0:
            return self
        merged = [
            weight if pair is None else (weight.float() + pair[1].float() @ pair[0].float()).to(weight.dtype)
            for weight, pair in zip(self.weights, self.low_rank, strict=True)
        ]
        biases = [
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(merged, self.biases, strict=True)
        ]
        bias = None if all(bias is None for bias in self.biases) else torch.cat(biases)
        return Projection((torch.cat(merged),), (bias,), (None,))


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
    def projections(self) -> tuple[Projection, ...]:
        return self.query_key_value, self.output, self.gate_up, self.down

    def fused(self) -> Layer:
        input_norm, query_key_value = absorbed(self.input_norm, self.query_key_value.fused())
        mlp_norm, gate_up = absorbed(self.mlp_norm, self.gate_up.fused())
        return Layer(
            input_norm=input_norm,
            query_key_value=query_key_value,
            head_norm=self.head_norm,
            output=self.output.fused(),
            mlp_norm=mlp_norm,
            gate_up=gate_up,
            down=self.down.fused(),
        )


def absorbed(norm: Norm, projection: Projection) -> tuple[Norm, Projection]:
    """The same two with the norm's gain in the projection, where the norm has one apart."""
    if not isinstance(norm, LengthNorm) or norm.gain is None:
        return norm, projection
    return norm.without_gain(), projection.of_scaled(norm.gain)


def supports(lm: Any) -> bool:
    """Whether this file knows the architecture: its family, full attention everywhere, plain linear maps or LoRA."""
    config = lm.config.to_dict()
    rope = config.get("rope_parameters") or {}
    kinds = set(config.get("layer_types") or ["full_attention"])
    windowed = config["model_type"] == "mistral" and config.get("sliding_window") is not None
    if config["model_type"] not in FAMILIES or windowed or kinds != {"full_attention"}:
        return False
    if config.get("hidden_act") != "silu" or rope.get("rope_type") not in ROTARY:
        return False
    causal = causal_of(lm)
    attached = [module for layer in causal.model.layers for module in _linears(layer)]
    return all(type(module) is nn.Linear or _is_plain_lora(module) for module in [*attached, causal.lm_head])


def causal_of(lm: nn.Module) -> Any:
    """The transformers model, inside the adapter if there is one."""
    return lm.get_base_model() if isinstance(lm, PeftModel) else lm


def _linears(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    ]  # fmt: skip


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
    config = causal.config
    layers = [
        _layer(module, query_heads=config.num_attention_heads, kv_heads=config.num_key_value_heads)
        for module in causal.model.layers
    ]
    if sum(part.bytes_if_fused for layer in layers for part in layer.projections) > FUSED_BYTES:
        return layers
    return [layer.fused() for layer in layers]


def _layer(module: Any, *, query_heads: int, kv_heads: int) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    head_norm = None
    if attention.config.model_type == "qwen3":
        query = attention.q_norm.weight.expand(query_heads, -1)
        weight = torch.cat([query, attention.k_norm.weight.expand(kv_heads, -1)])
        head_norm = norm_of(weight, attention.q_norm.variance_epsilon)
    return Layer(
        input_norm=rms_norm(module.input_layernorm),
        query_key_value=projection(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norm=head_norm,
        output=projection(attention.o_proj),
        mlp_norm=rms_norm(module.post_attention_layernorm),
        gate_up=projection(mlp.gate_proj, mlp.up_proj),
        down=projection(mlp.down_proj),
    )


def rms_norm(module: Any) -> Norm:
    """The norm of a module of these families."""
    return norm_of(module.weight, module.variance_epsilon)


def projection(*modules: nn.Module) -> Projection:
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
