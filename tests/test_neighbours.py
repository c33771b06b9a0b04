"""A row's logits are its own at the lengths of the run, or the model is run otherwise, or refused."""

from __future__ import annotations

import re

import pytest
import torch
from recipe_support import config_of
from torch import nn
from transformers import AutoModelForCausalLM
from zoo import FAMILIES
from zoo_run import WORDS, config_for

from opsd_cli.engine import neighbours
from opsd_cli.engine.loading import find_source
from opsd_cli.engine.model_limits import longest_of
from opsd_cli.engine.neighbours import choose_layout, long_rows
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.process_group import alone
from opsd_cli.rank.build import build_policy
from opsd_cli.settings.errors import DataError

LONGEST = 120
CAPACITY = 80  # tokens that an expert takes of a batch: more than it is given of the usual trial rows


def model(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family].config(), dtype=dtype).eval()


def experts_of(causal) -> list[nn.Module]:
    return [module for module in causal.modules() if type(module).__name__.endswith("Experts")]


def limit_capacity(module: nn.Module, args: tuple) -> tuple:
    """Have each expert drop what comes after its first tokens of the batch."""
    states_ND, expert_NK, weight_NK = args
    for expert in range(4):
        taken = (expert_NK == expert).flatten().cumsum(0).view_as(expert_NK)
        weight_NK = weight_NK.masked_fill((expert_NK == expert) & (taken > CAPACITY), 0.0)
    return states_ND, expert_NK, weight_NK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_whose_long_rows_depend_on_each_other_is_refused(dtype: torch.dtype):
    """Experts with a capacity, which no config tells of; the usual trial rows are too short to reach it."""
    causal = model("mixtral", dtype)
    for experts in experts_of(causal):
        experts.register_forward_pre_hook(limit_capacity)
    assert usable_layout(causal, alone()).layout == "packed"
    causal.set_attn_implementation("sdpa")
    with pytest.raises(DataError, match=f"a row of {LONGEST} tokens depend on the rows beside it.*lower prompts"):
        choose_layout(causal, alone(), longest=LONGEST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma2", "mistral"])
def test_a_model_whose_long_rows_are_apart_runs_as_it_would_by_short_ones(family: str, dtype: torch.dtype):
    causal = model(family, dtype)
    choice = choose_layout(causal, alone(), longest=LONGEST)
    assert choice == usable_layout(model(family, dtype), alone())


def test_a_model_whose_own_pass_fails_in_its_number_format_is_refused_in_one_line():
    with pytest.raises(DataError, match=r"type mamba cannot be run here in bfloat16: .*try another model.dtype"):
        choose_layout(model("mamba", torch.bfloat16), alone(), longest=LONGEST)


def test_attention_that_has_windows_in_long_rows_only_is_padded():
    causal = model("llama")

    def with_window(module: nn.Module, args: tuple, given: dict) -> tuple:
        return args, given | ({"sliding_window": 64} if given["hidden_states"].shape[1] > 90 else {})

    for layer in causal.model.layers:
        layer.self_attn.register_forward_pre_hook(with_window, with_kwargs=True)
    choice = choose_layout(causal, alone(), longest=LONGEST)
    assert choice.layout == "padded"
    assert re.search(rf"rows of {LONGEST} tokens cannot be run like that", choice.reason)
    assert causal.config._attn_implementation == "sdpa"


def test_the_check_is_as_long_as_the_run_and_the_model_allow_and_costs_little(monkeypatch: pytest.MonkeyPatch):
    assert long_rows(model("llama"), 30) is None
    assert long_rows(model("llama"), 4000).longest == 128  # its positions
    monkeypatch.setitem(neighbours.MOST_OPERATIONS, "cpu", 1e6)
    assert long_rows(model("llama"), 128) is None


def test_a_run_checks_rows_of_its_own_length(tmp_path, monkeypatch: pytest.MonkeyPatch):
    FAMILIES["mixtral"].make(tmp_path / "mixtral")
    base = config_of(*WORDS, "prompts.max_tokens=100")
    config = config_for("mixtral", tmp_path / "mixtral", base, rank=0)
    kind = type(experts_of(model("mixtral"))[0])
    whole = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: whole(self, *limit_capacity(self, args)))
    with pytest.raises(DataError, match=f"a row of {longest_of(config)} tokens depend"):
        build_policy(config, find_source(config.model, dtype=torch.float32), torch.device("cpu"), alone())
