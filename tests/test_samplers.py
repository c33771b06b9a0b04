"""Samplers beside the static one: that they draw from the same model and keep what they drew; what vLLM is given."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from recipe_support import only_problem_of, problems_of
from support import opsd
from transformers import PreTrainedModel

from opsd_cli.data.problems import Problem, PromptPair
from opsd_cli.engine.policy import Source, add_adapter, load_causal, load_tokenizer, resolve
from opsd_cli.engine.process_group import alone
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.continuous import ContinuousSampler
from opsd_cli.sampling.samplers import SampleRequest, StaticSampler
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.sampling.vllm import INSTALL, merged_weights
from opsd_cli.settings.config import LoraSettings, SamplingSettings

GREEDY = SamplingSettings(max_completion_tokens=24, temperature=0.0, top_p=1.0, top_k=0)
WARM = replace(GREEDY, temperature=1.2)
STATIC = StaticSampler(max_rows=8, cache_tokens=4096, prompt="student", dataset_share=0.0)
CONTINUOUS = ContinuousSampler(max_rows=8, cache_tokens=4096, prompt="student", dataset_share=0.0)


@dataclass
class PlainEngine:
    """The tiny model as it is, for samplers."""

    causal: PreTrainedModel
    source: Source
    end_ids: tuple[int, ...]
    pad_id: int

    def complete(self, draws: list[Draw], *, sampling, limits: BatchLimits, should_stop) -> list[Completion]:
        completer = Completer(alone(), pad_id=self.pad_id)
        return completer.complete(
            self.causal, draws, sampling=sampling, end_ids=self.end_ids, limits=limits, should_stop=should_stop
        )

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        yield self.causal


@pytest.fixture(scope="module")
def engine() -> PlainEngine:
    source = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)
    return PlainEngine(load_causal(source), source, (1,), 0)


@pytest.fixture(scope="module")
def request_of(engine: PlainEngine):
    tokenizer = load_tokenizer(engine.source)
    questions = ("Tom has 4 coins. He finds 3 coins. How many coins does he have?", "Ann has 12 shells.", "What?")
    pairs = []
    for i, question in enumerate(questions):
        chat = [{"role": "user", "content": question}]
        ids = tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        pairs.append(PromptPair(Problem(str(i), question, "1+1=2", "2"), ids, ids))

    def made(sampling: SamplingSettings, *, rollouts: int = 1, should_stop=lambda: False) -> SampleRequest:
        return SampleRequest(
            prompts=list(enumerate(pairs)),
            rollouts_per_problem=rollouts,
            sampling=sampling,
            seed=0,
            policy_step=3,
            encode_completion=lambda text: tokenizer(text)["input_ids"],
            should_stop=should_stop,
        )

    return made


def test_continuous_batching_says_greedily_what_the_static_sampler_says(engine, request_of):
    ours, theirs = (sampler.sample(engine, request_of(GREEDY)) for sampler in (STATIC, CONTINUOUS))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.prompt, a.completion_ids, a.finish_reason) == (b.prompt, b.completion_ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def test_continuous_batching_keeps_log_probabilities_and_repeats_itself(engine, request_of):
    state = torch.random.get_rng_state()
    made = CONTINUOUS.sample(engine, request_of(WARM, rollouts=4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len({rollout.completion_ids for rollout in made}) > 3
    for rollout in made:
        prompt, ids = rollout.prompt.student_ids, rollout.completion_ids
        with torch.no_grad():
            logits = engine.causal(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / WARM.temperature).log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
        assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
        assert (rollout.finish_reason == "stop") == (ids[-1] == 1)
    again = CONTINUOUS.sample(engine, request_of(WARM, rollouts=4))
    assert [rollout.completion_ids for rollout in again] == [rollout.completion_ids for rollout in made]
    assert engine.causal.config._attn_implementation == "sdpa"


def test_continuous_batching_heeds_a_request_to_stop(engine, request_of):
    made = CONTINUOUS.sample(engine, request_of(WARM, should_stop=lambda: True))
    assert len(made) == 3
    assert any(not rollout.completion_ids for rollout in made)


def test_continuous_batching_takes_a_step_of_a_run(tmp_path: Path):
    ended = opsd(
        "train", "recipe=quickstart", "sampler=continuous", "train.steps=1", "eval.problems=0", "checkpoint.every=0",
        "train.problems_per_step=4", "lora=r16", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_sampler_says_how_to_install_it():
    assert INSTALL in only_problem_of("recipe=quickstart", "sampler=vllm")


def test_a_vllm_engine_that_is_too_short_is_refused():
    problems = problems_of("recipe=quickstart", "sampler=vllm", "sampler.max_positions=100")
    assert any("sampler.max_positions is 100" in problem for problem in problems)


def test_vllm_is_given_the_plain_models_weights_with_the_adapter_merged(engine):
    lora = LoraSettings(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "down_proj"))
    lm = add_adapter(load_causal(engine.source), lora, seed=0)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    given = dict(merged_weights(lm))
    plain = dict(lm.merge_and_unload().named_parameters())
    assert given.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(given[name], weight.data, rtol=1e-5, atol=1e-6)
