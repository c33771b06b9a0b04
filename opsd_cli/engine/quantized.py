"""Frozen weights in 4 bits under LoRA, by bitsandbytes (the extra `quantize`): a quarter of the memory of bfloat16 for
what is not trained. How such a model is loaded, and where its whole weights come from when they are needed again.

The matrices of the layers become NF4 with scales in fp32, which are quantised once more; embeddings, head and norms
stay as they are. What is trained, the adapter, is as without.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig


def four_bit_options(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers is told to load a model's layers in 4 bits on `device`, where they also stay."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def keep_differentiable(causal: nn.Module) -> None:
    """Have quantised layers on a CPU stay what they can be trained through. Where the processor has products in
    bfloat16 bitsandbytes packs them anew at the first pass without gradient, and from then on they pass none on."""
    from bitsandbytes.nn import Linear4bit  # the extra

    for module in causal.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether its numbers are packed, two to a byte, with their scales beside them."""
    return "quant_state" in parameter.__dict__


def sharing_copy(lm: nn.Module) -> nn.Module:
    """A second tree of modules over the same parameters and buffers, with the scales of those that are packed."""
    tensors = [*lm.parameters(), *lm.buffers()]
    shared = [*tensors, *(tensor.quant_state for tensor in tensors if "quant_state" in tensor.__dict__)]
    return copy.deepcopy(lm, {id(part): part for part in shared})


def size_of(parameter: nn.Parameter) -> int:
    """How many weights it holds."""
    return prod(parameter.quant_state.shape) if is_packed(parameter) else parameter.numel()


def with_originals(weights: Mapping[str, Tensor], original: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`weights`, the parameters of a peft model by name, with those of `original`, the model as it was before it was
    quantised, in place of all that the adapter does not own."""
    whole = dict(original.named_parameters())
    for name, tensor in weights.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        yield name, whole[plain].data if plain in whole else tensor
