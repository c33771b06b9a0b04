"""Rows one after another give the hidden states of rows apart; a model that cannot do that is padded."""

from __future__ import annotations

import json
import re

import pytest
import torch
from deep_models import OUTLIERS, deep_model
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_support import config_of
from support import TESTS, run_ranks
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel

from opsd_cli.engine import packed
from opsd_cli.engine.agreement import PROBE_LENGTHS
from opsd_cli.engine.loading import Source, load_causal, resolve
from opsd_cli.engine.packed import (
    LayoutChoice,
    group_similar,
    packed_attention,
    row_bounds,
    row_groups,
    run_rows,
    usable_layout,
    why_not,
)
from opsd_cli.engine.process_group import alone
from opsd_cli.settings.typed_config import plain_tree

SMALL = (
    "eval.problems=0", "dataset.train_problems=30", "dataset.validation_problems=0", "dataset.test_problems=0",
    "dataset.retention_problems=0", "sampling.max_completion_tokens=24", "loss.mask_truncated=false",
)  # fmt: skip
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
    for layout in ("padded", usable_layout(causal, alone()).layout):
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
    ("model", "reason"),
    [
        (lambda: mistral(window=None), ""),
        (lambda: mistral(window=8), "logits of packed rows deviate|cannot be run with packed rows"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval(), ""),
        (lambda: deep_model("gemma3_text", torch.float32, num_hidden_layers=2), "layers of sliding_attention"),
    ],
    ids=["full attention", "a sliding window", "learned positions", "some layers with windows"],
)
def test_the_layout_is_what_the_model_can_do_and_says_why(model, reason: str):
    causal = model()
    attention = causal.config._attn_implementation
    choice = usable_layout(causal, alone())
    assert choice.layout == ("padded" if reason else "packed")
    assert re.search(reason, choice.reason) if reason else choice.reason == ""
    if reason:
        assert causal.config._attn_implementation == attention


def test_the_kernel_for_rows_of_any_lengths_is_called_as_torch_defines_it_and_is_refused_where_there_is_none():
    """Shapes only: it runs on GPUs, where `scripts/gpu_check.py` compares it with float64."""
    lengths, meta = (5, 1, 9), torch.device("meta")
    shapes = [(1, heads, sum(lengths), 16) for heads in (4, 2, 2)]
    parts = [torch.empty(shape, device=meta, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    out, _ = packed_attention(torch.nn.Identity(), *parts, None, rows=row_bounds(lengths, meta), scaling=0.25)
    assert out.shape == (1, sum(lengths), 4, 16)
    out.sum().backward()
    assert [part.grad.shape for part in parts] == shapes
    assert row_bounds(lengths, torch.device("cpu")).bounds.tolist() == [0, 5, 6, 15]
    causal = mistral(window=None)
    assert why_not(causal, "varlen").startswith("the model cannot be run with packed rows (NotImplementedError")
    causal.model.layers[0].self_attn.attention_dropout = 0.1
    assert why_not(causal, "varlen").endswith("has no dropout, and the model has (model.dropout=true)")


def test_attention_that_cannot_be_tried_or_packed_is_padded():
    eager = mistral(window=None)
    eager.set_attn_implementation("eager")
    assert usable_layout(eager, alone()).reason.startswith("model.attention=eager can only be padded")
    flash = mistral(window=None)
    flash.config._attn_implementation = "flash_attention_2"
    assert "the model is on the CPU" in usable_layout(flash, alone()).reason


def leaking(*, tokens: int, layers: range):
    """Packed attention whose rows, in some layers, also see that many tokens of the row before."""

    def attention(module, query, key, value, mask, *, rows=None, scaling=None, **more):
        if rows is None or module.layer_idx not in layers:
            return RIGHT(module, query, key, value, mask, rows=rows, scaling=scaling)
        lengths = torch.tensor(PROBE_LENGTHS)
        row_L = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        first_L = (lengths.cumsum(0) - lengths)[row_L]
        place_L = torch.arange(len(row_L))
        seen_LL = (place_L[None] >= first_L[:, None] - tokens) & (place_L[None] <= place_L[:, None])
        made = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen_LL, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return made.transpose(1, 2), None

    return attention


RIGHT = packed.packed_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma"])
@pytest.mark.slow
def test_rows_that_see_one_token_of_another_are_padded_and_rounding_is_not(kind: str, dtype: torch.dtype, monkeypatch):
    causal = deep_model(kind, dtype)
    states_LD = run_rows(causal.get_decoder(), torch.arange(20), [20], layout="padded").float()
    assert states_LD[:, list(OUTLIERS)].abs().mean() > 100 * states_LD.abs().median(), "no outliers"
    assert usable_layout(causal, alone()) == LayoutChoice("packed")
    for tokens, layers in ((40, range(28)), (1, range(28)), (1, range(27, 28))):
        monkeypatch.setattr(packed, "packed_attention", leaking(tokens=tokens, layers=layers))
        causal.set_attn_implementation("sdpa")
        choice = usable_layout(causal, alone())
        assert choice.layout == "padded"
        assert "deviate" in choice.reason or "see each other" in choice.reason


@pytest.mark.slow
def test_ranks_that_disagree_run_one_layout_and_one_decoder_and_score_each_rollout_once(tmp_path):
    """Each rank plans the micro-batches of all, by its own layout: two plans would score rollouts twice, or never."""
    words = (
        "launcher.ranks=2",
        "train.problems_per_step=6",
        "train.micro_batch_tokens=260",
        "sampling.temperature=2",
    )
    tree = plain_tree(config_of("recipe=quickstart", "teacher=external", "teacher.path=bundled:tiny", *words, *SMALL))
    (tmp_path / "config.json").write_text(json.dumps(tree))
    run_ranks([TESTS / "layout_ranks.py", tmp_path / "config.json"], 2)
    found = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    drawn, scored = ([key for one in found for key in one[what]] for what in ("drawn", "scored"))
    assert len(drawn) == 6 * tree["train"]["rollouts_per_problem"]
    assert sorted(scored) == sorted(drawn)
    assert [one["layout"] for one in found] == ["padded"] * 2
    assert [one["attention"] for one in found] == ["sdpa"] * 2
    assert [one["decoder"] for one in found] == ["HFDecoder"] * 2
    assert found[0]["plan"] == found[1]["plan"]
    rows, teachers_rows, completions, _ = found[0]["plan"]
    assert rows.startswith("rows: padded to the longest of a micro-batch: logits of packed rows deviate")
    assert teachers_rows.startswith("the teacher's rows: padded")
    assert completions.startswith("completions: drawn by the model's own forward pass: the fast pass deviates")
    assert all(line.endswith("(on rank 1 of 2)") for line in (rows, teachers_rows, completions))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_every_token_has_its_place_in_a_group_of_similar_rows(lengths: list[int]):
    groups = row_groups(lengths, torch.device("cpu"))
    tokens = torch.cat([places for places, _ in groups.places])
    assert torch.equal(tokens[groups.place_in_groups_L], torch.arange(sum(lengths)))
    assert sum(count for _, count in groups.places) == len(lengths)
    for rows in group_similar(lengths):
        assert min(lengths[row] for row in rows) >= 0.7 * max(lengths[row] for row in rows)
