"""Logits made from hidden states and head are the model's own, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from deep_models import deep_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from opsd_cli.engine.logits_check import check_logits
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import alone
from opsd_cli.settings.errors import DataError

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def policy_of(kind: str, dtype: torch.dtype, **settings) -> Policy:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SMALL, **settings)
    causal = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Policy(causal, layout=usable_layout(causal, alone()).layout)


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


LATER = {
    "a soft cap of 30": lambda logits: 30 * torch.tanh(logits / 30),
    "a factor of 1.02": lambda logits: 1.02 * logits,
}
BEFORE = {
    "hidden states multiplied by 1.02": lambda hidden: 1.02 * hidden,
    "hidden states of the position before": lambda hidden: hidden.roll(1, dims=1),
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def deep_policy(request: pytest.FixtureRequest) -> Policy:
    causal = deep_model("qwen3", request.param)
    return Policy(causal, layout=usable_layout(causal, alone()).layout)


def test_rounding_in_a_deep_model_is_no_reason_to_refuse_it(deep_policy: Policy):
    check_logits(deep_policy, "x")


@pytest.mark.parametrize("fault", LATER)
def test_what_becomes_of_small_logits_later_is_seen_in_any_precision(deep_policy: Policy, fault: str, monkeypatch):
    """The logits stay below 10, where such a cap changes them by as little as rounding does."""
    whole = deep_policy.causal.forward

    def forward(**given):
        made = whole(**given)
        made.logits = LATER[fault](made.logits)
        return made

    assert whole(input_ids=torch.arange(40)[None]).logits.abs().max() < 10
    monkeypatch.setattr(deep_policy.causal, "forward", forward)
    with pytest.raises(DataError, match="makes its logits in a way"):
        check_logits(deep_policy, "x")


@pytest.mark.parametrize("fault", BEFORE)
def test_a_head_that_is_given_something_else_is_seen_in_any_precision(deep_policy: Policy, fault: str, monkeypatch):
    causal = deep_policy.causal

    def forward(input_ids, **given):
        states = causal.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=causal.lm_head(BEFORE[fault](states)))

    monkeypatch.setattr(causal, "forward", forward)
    with pytest.raises(DataError, match="its head is given something other"):
        check_logits(deep_policy, "x")


def test_a_policy_that_runs_its_decoder_otherwise_than_the_model_is_refused(deep_policy: Policy, monkeypatch):
    """Here the model multiplies what it embeds before it calls its decoder, as the policy does not."""
    whole, embed = deep_policy.causal.forward, deep_policy.causal.get_input_embeddings()

    def forward(input_ids, **given):
        return whole(inputs_embeds=1.2 * embed(input_ids), **given)

    monkeypatch.setattr(deep_policy.causal, "forward", forward)
    with pytest.raises(DataError, match="on a few short rows they deviate"):
        check_logits(deep_policy, "x")


def test_a_model_that_does_not_call_its_head_is_refused(deep_policy: Policy, monkeypatch):
    causal = deep_policy.causal

    def forward(input_ids, **given):
        states = causal.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=states @ causal.lm_head.weight.T)

    monkeypatch.setattr(causal, "forward", forward)
    with pytest.raises(DataError, match="does not call its decoder and its output head once each"):
        check_logits(deep_policy, "x")
