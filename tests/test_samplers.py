"""Samplers beside the static one: what vLLM needs, and what it is given."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from recipe_support import only_problem_of, problems_of

from opsd_cli.engine.loading import Source, add_adapter, load_causal, resolve
from opsd_cli.engine.merging import merged_parameters
from opsd_cli.sampling.vllm import INSTALL
from opsd_cli.settings.config import LoraSettings


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_sampler_says_how_to_install_it():
    assert INSTALL in only_problem_of("recipe=quickstart", "sampler=vllm")


def test_a_vllm_engine_that_is_too_short_is_refused():
    problems = problems_of("recipe=quickstart", "sampler=vllm", "sampler.max_positions=100")
    assert any("sampler.max_positions is 100" in problem for problem in problems)


def test_vllm_is_given_the_plain_models_weights_with_the_adapter_merged():
    source = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)
    lora = LoraSettings(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "down_proj"))
    lm = add_adapter(load_causal(source), lora, seed=0)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    given = dict(merged_parameters(lm))
    plain = dict(lm.merge_and_unload().named_parameters())
    assert given.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(given[name], weight.data, rtol=1e-5, atol=1e-6)
