"""Tiny random models of many architectures, as folders that transformers would read: what `test_zoo` trains, and what
`scripts/make_model_table.py` makes the table of docs/models.md from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

TINY = Path(__file__).parents[1] / "opsd_cli" / "assets" / "tiny"
VOCABULARY = 257  # no multiple of 8
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    **ENDS,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture: what of it is special, and its settings beside the common sizes."""

    kind: str  # transformers' model_type
    what: str
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: bool = True  # whether the common sizes have the usual names
    targets: tuple[str, ...] = ("all-linear",)  # of an adapter

    def config(self) -> Any:
        given = {**(SIZES if self.sizes else {"vocab_size": VOCABULARY, **ENDS}), **self.settings}
        return CONFIG_MAPPING[self.kind](**given)

    def make(self, folder: Path) -> None:
        """Write the model with random weights, and the tokenizer of the bundled model, whose first ids it knows."""
        torch.manual_seed(0)
        causal = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        for module in causal.modules():
            # Some architectures start so near to zero that no token would show in another's logits.
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.data += 0.1 * torch.randn(module.weight.shape, generator=generator)
        causal.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TINY / name, folder)


FAMILIES = {
    "llama": Family("llama", "grouped heads"),
    "llama3": Family("llama", "rotary frequencies scaled by wavelength", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral": Family("mistral", "sliding window", {"sliding_window": 8}),
    "qwen2": Family("qwen2", "biased projections, tied head", {"tie_word_embeddings": True}),
    "qwen3": Family("qwen3", "norms of the heads, tied head", {"tie_word_embeddings": True, "head_dim": 16}),
    "smollm3": Family("smollm3", "layers without rotation", {"no_rope_layers": [1, 0]}),
    "olmo2": Family("olmo2", "norms after the sublayers"),
    "granite": Family("granite", "scaled embeddings, residuals and logits", {
        "logits_scaling": 4.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5}),
    "cohere": Family("cohere", "parallel sublayers, scaled logits", {"logit_scale": 0.25}),
    "gemma": Family("gemma", "one key head, tied head", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": Family("gemma2", "soft-capped attention and logits, sliding windows", {
        "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "sliding_window": 8}),
    "gemma3_text": Family("gemma3_text", "two kinds of windows and rotations", {"head_dim": 16, "sliding_window": 8}),
    "gemma3": Family("gemma3", "the text part of a model that sees", {
        "text_config": {**SIZES, "head_dim": 16, "sliding_window": 8}, "vision_config": VISION,
        "mm_tokens_per_image": 4, "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252,
        "eos_token_id": 1, "pad_token_id": 0}, sizes=False),
    "phi3": Family("phi3", "fused projections, long-context frequencies", {
        "original_max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 64, "factor": 2.0}}),
    "phi": Family("phi", "partial rotation, a head with a bias"),
    "stablelm": Family("stablelm", "partial rotation, layer norms"),
    "starcoder2": Family("starcoder2", "biases and layer norms", {"sliding_window": 8}),
    "gpt2": Family("gpt2", "learned positions, transposed projections, dropout", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, sizes=False),
    "gpt_neo": Family("gpt_neo", "learned positions, local attention", {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "window_size": 8,
        "attention_types": [[["global", "local"], 1]]}, sizes=False),
    "gpt_neox": Family("gpt_neox", "fused projections, parallel sublayers"),
    "gptj": Family("gptj", "interleaved rotation, a head with a bias", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}, sizes=False),
    "opt": Family("opt", "learned positions with an offset", {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32, "dropout": 0.1}, sizes=False),
    "bloom": Family("bloom", "ALiBi", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, sizes=False),
    "mpt": Family("mpt", "ALiBi", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, sizes=False),
    "falcon": Family("falcon", "one key head, parallel sublayers", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}, sizes=False),
    "mixtral": Family("mixtral", "mixture of experts", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family("qwen3_moe", "mixture of experts", {**EXPERTS, "head_dim": 16}),
    "olmoe": Family("olmoe", "mixture of experts", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": Family("deepseek_v3", "compressed keys and values, mixture of experts", {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16}),
    "gpt_oss": Family("gpt_oss", "attention sinks, mixture of experts", {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "qwen3_5": Family("qwen3_5_text", "linear attention beside full attention", {
        **LINEAR, "num_hidden_layers": 4, "head_dim": 16, "tie_word_embeddings": True}),
    "lfm2": Family("lfm2", "convolutions beside full attention", {"layer_types": ["conv", "full_attention"]}),
    "mamba": Family("mamba", "state space", {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, sizes=False, targets=("in_proj",)),
    "mamba2": Family("mamba2", "state space", {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2,
        "chunk_size": 16}, sizes=False, targets=("in_proj",)),
    "falcon_h1": Family("falcon_h1", "state space and attention side by side", {
        "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        "mamba_chunk_size": 16}, targets=("in_proj", "q_proj")),
    "recurrent_gemma": Family("recurrent_gemma", "gated recurrences beside local attention", {
        "lru_width": 32, "attention_window_size": 8}),
}  # fmt: skip
