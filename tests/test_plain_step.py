"""docs/examples/plain_step.py, the method in one file, computes what the engine computes."""

from __future__ import annotations

import copy
import runpy
from types import SimpleNamespace

import pytest
import torch
from one_process import OneProcessEngine, one_rank
from recipe_support import config_of
from support import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd_cli.data.pairing import pair
from opsd_cli.data.problems import PromptPair, Rollout
from opsd_cli.engine.device import card_of
from opsd_cli.engine.weight_copies import trainable
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.rank.run_data import load_run_data

pytestmark = pytest.mark.slow

PLAIN = REPOSITORY / "docs" / "examples" / "plain_step.py"
CPU = torch.device("cpu")


def test_the_file_is_short() -> None:
    assert len(PLAIN.read_text(encoding="utf-8").splitlines()) <= 150


def test_prompts_loss_and_gradient_of_the_plain_step_are_those_of_the_engine() -> None:
    plain = SimpleNamespace(**runpy.run_path(str(PLAIN)))
    config = config_of("recipe=quickstart", "eval.problems=0", "train.steps=1", "train.problems_per_step=3")
    run_data = load_run_data(config, [card_of(CPU)], lambda _: None, train=True)
    pairs = run_data.train_prompts.at(range(3))
    run_data.close()
    tokenizer = AutoTokenizer.from_pretrained(plain.TINY)
    prompts = [plain.both_prompts(tokenizer, prompt.problem) for prompt in pairs]
    assert prompts == [(list(prompt.student_ids), list(prompt.teacher_ids)) for prompt in pairs]

    model = AutoModelForCausalLM.from_pretrained(plain.TINY, dtype=torch.float32)
    torch.manual_seed(1)
    completions = plain.sample(model, tokenizer, [student for student, _ in prompts])
    # Not the weights at step 0, where the student already is its teacher but for the solution.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    teacher = AutoModelForCausalLM.from_pretrained(plain.TINY, dtype=torch.float32)
    loss = plain.backward(model, teacher, [(*both, c) for both, c in zip(prompts, completions, strict=True)])
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    with one_rank():
        engine = OneProcessEngine(config, run_data.source, CPU)
        initial = config.teacher.build(engine)
        with torch.no_grad():
            for name, parameter in trainable(engine.policy.lm).items():
                parameter.copy_(model.get_parameter(name))
        rollouts = [_rollout(prompt, ids) for prompt, ids in zip(pairs, completions, strict=True)]
        (batch,) = pair([[(rollout, [1.0] * len(rollout.completion_ids)) for rollout in rollouts]])
        token_loss = engine.student_loss(batch, initial.score(batch.teacher), Objective.of(config))
        engine.backward(token_loss.weighted_sum, denominator=batch.weight, last=True)
        found = {name: copy.copy(p.grad) for name, p in trainable(engine.policy.lm).items()}
    assert token_loss.weighted_sum.item() / batch.weight == pytest.approx(loss, abs=1e-5)
    assert loss > 0.01
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_loop_of_the_plain_step_learns(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = runpy.run_path(str(PLAIN))["main"](steps=10, held_out=50)
    assert after > before
    assert "KL" in capsys.readouterr().out


def _rollout(prompt: PromptPair, ids: list[int]) -> Rollout:
    return Rollout(prompt, tuple(ids), "stop", ())
