"""Models as deep as real ones, and narrow: random weights, sharp attention, a few dimensions with outliers. In bfloat16
they round as much as real ones do, which is what checks at load have to tell from a fault."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 28, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.06, "tie_word_embeddings": False,
}  # fmt: skip
OUTLIERS = (3, 40, 77)  # dimensions


def deep_model(kind: str, dtype: torch.dtype, **settings) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(SIZES | settings))
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(1)
    outliers = list(OUTLIERS)
    for name, parameter in causal.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            if parameter.shape == (config.hidden_size,):  # as in trained models, layers hardly read these dimensions
                parameter.data[outliers] = 0.02 if kind != "gemma" else -0.98
        if name.endswith(("layers.1.mlp.down_proj.weight", "layers.2.mlp.down_proj.weight")):
            parameter.data[outliers] *= 40
    causal.get_input_embeddings().weight.data[:, outliers] += 0.3
    causal.model.norm.weight.data[outliers] = 50.0  # hidden states of hundreds there, much the same at all positions
    causal.get_output_embeddings().weight.data[:, outliers] *= 0.01
    causal.get_output_embeddings().weight.data *= 3  # logits of a few units, as trained models have
    return causal.to(dtype)
