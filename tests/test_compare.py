"""`opsd compare`: arms paired over problems and seeds at equal cost, and no claim of what a control gives too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_support import opsd
from run_support import make_run
from support import opsd as opsd_process

from opsd_cli.insight.arms import Basis, Comparison, compare_arms
from opsd_cli.insight.history import History, read_history
from opsd_cli.run.evaluations import completions_file, read_outcomes, write_lines
from opsd_cli.run.folder import RunFolder

Right = tuple[int, int]
"""Problems of 40 that are right before and after."""


def compared(root: Path, arms: dict[str, list[Right | None]], basis: Basis = "updates") -> Comparison:
    """Arms with a run for each seed; None is one that failed."""
    runs: dict[str, dict[int, History | None]] = {}
    for arm, seeds in arms.items():
        runs[arm] = {}
        for seed, right in enumerate(seeds):
            outcome = "completed" if right else "failed"
            folder = make_run(
                root / arm, str(seed), right=right or (10, 10), outcome=outcome, changes={"run.seed": seed}
            )
            runs[arm][seed] = read_history(folder.path)
    return compare_arms(runs, basis=basis, split="test")


def test_a_gain_that_no_control_gives_is_claimed(tmp_path: Path) -> None:
    found = compared(
        tmp_path, {"solution": [(10, 30), (10, 32)], "shuffled": [(10, 11), (10, 9)], "sft": [(10, 31)] * 2}
    )
    assert found.headline == "solution gains what its controls do not give"
    assert found.arms[0].gain.low > 0
    assert found.arms[1].behind is not None
    assert found.arms[1].behind.low > 0
    assert "solution against sft: " in found.reasons[2]
    assert found.reasons[2].endswith("no difference beyond noise")


def test_a_gain_that_the_control_gives_too_is_none(tmp_path: Path) -> None:
    found = compared(tmp_path, {"solution": [(10, 30), (10, 31)], "shuffled": [(10, 31), (10, 30)]})
    assert found.arms[0].gain.low > 0  # it did gain
    assert found.headline == "No gain can be claimed for solution: a control gives it too"
    assert found.reasons[1].endswith("the control does as well, within noise")


def test_a_reference_with_a_wrong_answer_is_no_control(tmp_path: Path) -> None:
    """It holds the steps: that it teaches as much says what of a reference teaches."""
    found = compared(tmp_path, {"solution": [(10, 30)] * 2, "wrong": [(10, 30), (10, 29)], "shuffled": [(10, 9)] * 2})
    assert found.headline == "solution gains what its controls do not give"
    assert found.reasons[2].endswith("the steps teach, not the final answer")
    found = compared(tmp_path / "b", {"solution": [(10, 30)] * 2, "wrong": [(10, 12)] * 2})
    assert found.reasons[1].endswith("the reference's final answer matters")


def test_without_a_control_the_verdict_asks_for_one(tmp_path: Path) -> None:
    found = compared(tmp_path, {"solution": [(10, 30)] * 2, "sft": [(10, 20)] * 2})
    assert "add shuffled to the arms" in found.headline
    assert found.reasons[-1].endswith(": better")


def test_one_seed_is_said_to_be_one(tmp_path: Path) -> None:
    found = compared(tmp_path, {"solution": [(10, 30)], "shuffled": [(10, 10)]})
    assert "a single seed" in found.reasons[-1]


def test_what_did_not_finish_is_left_out_and_told(tmp_path: Path) -> None:
    found = compared(tmp_path, {"solution": [(10, 30), None], "shuffled": [(10, 10), (10, 12)]})
    assert found.missing == ("solution, seed 1: failed",)
    assert [arm.seeds for arm in found.arms] == [(0,), (0, 1)]
    assert found.arms[1].behind is not None  # over the seed that both have
    none = compared(tmp_path / "none", {"solution": [None], "shuffled": [(10, 10)]})
    assert none.headline == "Nothing can be said: no run of solution has finished"


def test_at_equal_tokens_a_run_counts_at_what_the_cheapest_has_spent(tmp_path: Path) -> None:
    """Each step costs 60 tokens and 0.3 s: of a run of 20 steps and one of 5, the long one has only its start."""
    short = make_run(tmp_path / "a", "0", right=(10, 20), steps=5, changes={"run.seed": 0})
    long = make_run(tmp_path / "b", "0", right=(10, 30), steps=20, changes={"run.seed": 0})
    runs = {"solution": {0: read_history(short.path)}, "shuffled": {0: read_history(long.path)}}
    found = compare_arms(runs, basis="tokens", split="test")
    assert found.budget == 300
    assert [(arm.step, arm.tokens) for arm in found.arms] == [(5, 300), (0, 0)]
    assert found.arms[1].gain.value == 0.0
    seconds = compare_arms(runs, basis="seconds", split="test")
    assert seconds.budget == pytest.approx(1.5)
    assert compare_arms(runs, basis="updates", split="test").arms[1].step == 20


def completions_at_end(folder: RunFolder) -> Path:
    return completions_file(folder, step=20, split="test", role="student")


def test_of_several_completions_of_a_problem_all_count(tmp_path: Path) -> None:
    """With eval.samples=2 a problem of which one completion is right counts as half of one."""
    folder = make_run(tmp_path, "0", right=(0, 40))
    wrong = [{**line, "correct": False} for line in read_outcomes(completions_at_end(folder))]
    write_lines(completions_at_end(folder), [*read_outcomes(completions_at_end(folder)), *wrong])
    found = compare_arms({"solution": {0: read_history(folder.path)}}, basis="updates", split="test")
    assert (found.arms[0].after, found.arms[0].gain.value) == (0.5, 0.5)


def test_a_run_whose_completions_are_gone_is_left_out_and_told(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / arm, "0", right=(10, 30)) for arm in ("solution", "shuffled")]
    completions_at_end(folders[1]).unlink()
    runs = {folder.path.parent.name: {0: read_history(folder.path)} for folder in folders}
    found = compare_arms(runs, basis="updates", split="test")
    assert [arm.name for arm in found.arms] == ["solution"]
    assert found.missing == ("shuffled, seed 0: no completions of the test split in its folder evaluations",)


def test_a_control_without_a_common_seed_is_not_called_as_good(tmp_path: Path) -> None:
    found = compared(tmp_path, {"solution": [(10, 30), None], "shuffled": [None, (10, 10)]})
    assert found.headline == "No gain can be claimed for solution yet: no seed of it and of shuffled has finished"
    assert found.reasons[1] == "solution against shuffled (control): not compared, no seed of both has finished"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recipe=quickstart",), "name a recipe and its arms"),
        (("recipe=quickstart", "arms=solution"), "name at least two"),
        (("recipe=quickstart", "arms=solution,solutio"), "solutio is neither a context nor a method - did you mean"),
        (("recipe=quickstart", "arms=solution,sft,sft"), "sft is there twice"),
        (("recipe=quickstart", "arms=solution,sft", "seeds=x"), "seeds=x: a number of seeds"),
        (("recipe=quickstart", "arms=solution,sft", "seeds=1,1"), "different seeds"),
        (("recipe=quickstart", "arms=solution,sft", "seeds=²"), "seeds=²: a number of seeds"),
        (("recipe=quickstart", "arms=solution,sft", "seeds=" + "9" * 5000), "a number of seeds"),
        (("recipe=quickstart", "arms=solution,sft", "eval.before=false"), "eval.before is false"),
        (("recipe=quickstart", "arms=solution,sft", "run.seed=1"), "opsd compare sets it"),
        (("recipe=quickstart", "arms=solution,sft", "--basis", "token"), "--basis token: one of"),
        (("recipe=quickstart", "arms=solution,sft", "optim.lr=1e-3,1e-4"), "optim.lr=1e-3,1e-4"),
        (("recipe=quickstart", "arms=solution,sft", "eval.problems=0"), "nothing is measured"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_runs(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = opsd(capsys, "compare", *words)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_arms_are_run_paired_and_not_run_again(tmp_path: Path) -> None:
    words = (
        "compare", "recipe=quickstart", "arms=solution,sft", "seeds=2", "train.steps=2", "eval.problems=8",
        "train.problems_per_step=2", "dataset.train_problems=40", "dataset.validation_problems=0",
        "dataset.test_problems=8", "dataset.retention_problems=4", "eval.teacher_prompt=false", "--basis", "tokens",
        "--json",
    )  # fmt: skip
    first = opsd_process(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert [arm["name"] for arm in told["arms"]] == ["solution", "sft"]
    assert [arm["seeds"] for arm in told["arms"]] == [[0, 1], [0, 1]]
    assert told["budget"] > 0
    assert all(arm["tokens"] <= told["budget"] for arm in told["arms"])
    assert told["arms"][0]["retention"] is not None
    again = opsd_process(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("has finished before") == 2
    assert json.loads(again.stdout) == told
