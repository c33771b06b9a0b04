"""Rows one after another give the hidden states of rows apart; a model that cannot do that is padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel

from opsd_cli.engine.packed import row_groups, run_rows, similar, usable_layout
from opsd_cli.engine.policy import Source, load_causal, resolve

TINY = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)


def mistral(*, window: int | None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=window, attn_implementation="sdpa",
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_packed_rows_give_the_states_and_gradients_of_padded_ones():
    causal = load_causal(TINY)
    lengths = (31, 4, 17, 30, 16, 1)
    ids_L = torch.randint(2, 1000, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    found = {}
    for layout in ("padded", usable_layout(causal)):
        causal.train()
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hidden_LD = run_rows(causal.get_decoder(), ids_L, lengths, layout=layout)
        causal.zero_grad()
        hidden_LD.square().sum().backward()
        found[layout] = hidden_LD.detach(), causal.model.layers[0].self_attn.k_proj.weight.grad.clone()
    assert found.keys() == {"padded", "packed"}
    for got, wanted in zip(found["packed"], found["padded"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (lambda: mistral(window=None), "packed"),
        (lambda: mistral(window=8), "padded"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval(), "packed"),
    ],
    ids=["full attention", "a sliding window", "learned positions"],
)
def test_the_layout_is_what_the_model_can_do(model, layout: str):
    causal = model()
    attention = causal.config._attn_implementation
    assert usable_layout(causal) == layout
    if layout == "padded":
        assert causal.config._attn_implementation == attention


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_every_token_has_its_place_in_a_group_of_similar_rows(lengths: list[int]):
    groups = row_groups(lengths, torch.device("cpu"))
    tokens = torch.cat([places for places, _ in groups.places])
    assert torch.equal(tokens[groups.place_in_groups_L], torch.arange(sum(lengths)))
    assert sum(count for _, count in groups.places) == len(lengths)
    for rows in similar(lengths):
        assert min(lengths[row] for row in rows) >= 0.7 * max(lengths[row] for row in rows)
