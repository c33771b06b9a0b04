"""Logits made from hidden states and head are the model's own, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from opsd_cli.engine.logits_check import check_logits
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.settings.errors import DataError

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def policy_of(kind: str, dtype: torch.dtype, **settings) -> Policy:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SMALL, **settings)
    causal = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Policy(causal, causal=causal, layout=usable_layout(causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    ],
)
def test_a_model_whose_logits_are_made_in_a_known_way_passes(kind: str, settings: dict, dtype: torch.dtype):
    check_logits(policy_of(kind, dtype, **settings), "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_caps_its_logits_under_an_unknown_name_is_refused(dtype: torch.dtype):
    policy = policy_of("recurrent_gemma", dtype, logits_soft_cap=1.0, lru_width=16)
    with pytest.raises(DataError, match=r"model x \(type recurrent_gemma\) makes its logits in a way.*not by a factor"):
        check_logits(policy, "x")


def test_a_factor_that_the_config_does_not_tell_is_named():
    policy = policy_of("granite", torch.float32, logits_scaling=4.0)
    policy.causal.config.logits_scaling = 1.0  # what the code reads when it runs
    with pytest.raises(DataError, match="as if multiplied by 4"):
        check_logits(policy, "x")
