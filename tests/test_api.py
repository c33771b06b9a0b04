"""opsd from Python: what a notebook does, through the plain engine, is what `opsd train` does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from support import REPOSITORY
from transformers import AutoModelForCausalLM

from opsd_cli import api
from opsd_cli.settings.errors import ConfigError
from opsd_cli.training.loop import train_step

pytestmark = pytest.mark.slow

SMALL = ("recipe=quickstart", "train.problems_per_step=4", "eval.problems=6", "dataset.train_problems=64",
         "dataset.validation_problems=0", "dataset.test_problems=6", "dataset.retention_problems=0",
         "eval.teacher_prompt=false")  # fmt: skip
TIMED = (*SMALL, "train.seconds=1e-6", "train.steps=50")


@pytest.fixture(scope="module")
def session() -> Iterator[api.Session]:
    with api.Session(api.compose(*TIMED)) as session:
        yield session


def test_both_roles_are_rendered_sampled_graded_and_scored(session: api.Session) -> None:
    pairs = session.render(session.problems[:2])
    solution = session.problems[0].solution
    assert solution in session.decode(pairs[0].teacher_ids)
    assert solution not in session.decode(pairs[0].student_ids)
    rollouts = session.sample(pairs, rollouts=2, seed=3)
    assert [rollout.prompt for rollout in rollouts] == [pairs[0], pairs[0], pairs[1], pairs[1]]
    assert rollouts == session.sample(pairs, rollouts=2, seed=3)
    assert len(session.grade(rollouts)) == len(session.texts(rollouts)) == 4
    scores = session.score(rollouts)
    assert [len(values) for values in scores] == [len(rollout.completion_ids) for rollout in rollouts]
    loss = session.loss(rollouts)
    assert sum(map(sum, scores)) == pytest.approx(loss.weighted_sum.item(), rel=1e-5)
    assert loss.weighted_sum.requires_grad


def test_the_loss_of_two_models_hidden_states_is_the_divergence(session: api.Session) -> None:
    torch.manual_seed(0)
    student = torch.randn(5, 8, requires_grad=True)
    teacher, weight, other = torch.randn(5, 8), torch.randn(11, 8), torch.randn(11, 8)
    loss = api.token_loss(
        session.config,
        student,
        api.Head(weight, None),
        teacher=api.TokenScores(teacher, api.Head(other, None)),
        target_ids_N=torch.arange(5),
    )
    log_p, log_q = (student @ weight.T).log_softmax(1), (teacher @ other.T).log_softmax(1)
    expected = (log_q.exp() * (log_q - log_p)).sum(1)
    torch.testing.assert_close(loss.value_N, expected.detach(), atol=1e-5, rtol=1e-4)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    (gradient,) = torch.autograd.grad(loss.weighted_sum, student)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


def test_a_step_of_the_plain_engine_is_the_step_of_a_run_which_ends_with_its_seconds(
    session: api.Session, tmp_path: Path
) -> None:
    done = support.opsd("train", *TIMED, "run.name=r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = api.load_run(tmp_path / "runs" / "r")
    assert run.config.train.seconds == 1e-6
    before = session.evaluate()
    (event,) = session.train()
    assert [step for step, _ in run.metric("loss/objective")] == [1]
    (recorded,) = [event["metrics"] for event in run.events if event["kind"] == "step"]
    for name, value in event["metrics"].items():
        if not name.startswith(("time/", "memory/", "compute/", "tokens/per_second")):
            assert value == pytest.approx(recorded[name], rel=1e-5, abs=1e-6), name
    assert event["metrics"]["compute/tflop"] == pytest.approx(recorded["compute/tflop"], rel=1e-9)
    assert recorded["compute/gflops_per_second"] > 0
    assert "compute/mfu" not in recorded, "a CPU has no peak in the table"
    assert sorted(run.evaluations) == [(0, "test", "student"), (1, "test", "student")]
    assert sum(line["correct"] for line in run.evaluations[0, "test", "student"]) == before.correct
    assert len(run.samples) == 4
    with (run.path / "samples.jsonl").open("a") as file:  # as while a run writes
        file.write('{"step": 2, "prob')
    assert len(api.load_run(run.path).samples) == 4
    assert (run.path / "checkpoints" / "step_000001").is_dir()
    assert session.step == 1
    assert list(session.train()) == []
    trained = AutoModelForCausalLM.from_pretrained(session.save_model(tmp_path / "model"))
    exported = AutoModelForCausalLM.from_pretrained(run.path / "model")
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, exported.get_parameter(name), atol=1e-5, rtol=1e-4, msg=name)


def test_a_context_that_the_policy_writes_is_drawn_in_the_step_counted_and_shown() -> None:
    words = (*SMALL, "eval.problems=0", "train.steps=1", "context=reflection", "context.write_tokens=12")
    prompts = []
    for _ in range(2):
        with api.Session(api.compose(*words)) as session:
            report = train_step(0, session._parts, updates=0)
            prompts.append([session.decode(sample.rollout.prompt.teacher_ids) for sample in report.samples])
    assert 0 < report.metrics["rollout/written_tokens"] <= 12
    assert 0 < report.metrics["time/write"] < report.metrics["time/step"]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == 4
    assert all("A note on an earlier attempt of yours:\n" in prompt for prompt in prompts[0])


def test_what_is_not_there_is_refused_in_one_line(session: api.Session, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        api.load_run(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        session.evaluate([])
    with pytest.raises(ConfigError, match="did you mean"):
        api.compose("recipe=quickstrat")


def test_the_loss_on_the_page_has_a_gradient() -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text("utf-8")
    (snippet,) = (text for text in page.split("```python\n") if "token_loss(config" in text and "import torch" in text)
    names: dict[str, Any] = {}
    exec(compile(snippet.partition("```")[0], "api.md", "exec"), names)
    assert names["student"].grad.abs().sum() > 0


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (notebook,) = (REPOSITORY / "docs" / "examples").glob("*.ipynb")
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(json.loads(notebook.read_text("utf-8"))["cells"]):
        assert cell.get("outputs", []) == []
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    assert names["after"].correct > names["before"].correct  # type: ignore[attr-defined]
