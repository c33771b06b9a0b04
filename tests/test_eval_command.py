"""`opsd eval` of checkpoints, with several completions of each problem, two graders, a stop in the middle, and another
run to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import opsd

from opsd_cli.cli import main
from opsd_cli.data.second_opinion import MathVerify
from opsd_cli.data.stated_answers import agreeing, stated_by
from opsd_cli.insight.evaluation import Outcome, summed_up
from opsd_cli.insight.harness import against, read_scores
from opsd_cli.insight.paired import compare
from opsd_cli.run.evaluations import read_completions, write_lines
from opsd_cli.run.events import read_events

SAMPLED = ("eval.samples=3", "eval.temperature=1.0", "eval.teacher_prompt=false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two steps, with a checkpoint of either."""
    folder = tmp_path_factory.mktemp("measured")
    words = (
        "recipe=quickstart", "lora=r16", "train.steps=2", "checkpoint.every=1", "eval.problems=6", "run.name=r",
        "dataset.train_problems=64", "dataset.retention_problems=4", "eval.max_rows=2", "eval.teacher_prompt=false",
        "dataset.validation_problems=0", "dataset.test_problems=6",
    )  # fmt: skip
    ended = opsd("train", *words, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def measured(run: Path) -> dict:
    """The last evaluation of a run under the student's prompt, without how long it took."""
    events = [e for e in read_events(run / "events.jsonl") if e["kind"] == "evaluation" and e["role"] == "student"]
    return {key: value for key, value in events[-1].items() if key not in ("time", "seconds", "step")}


@pytest.mark.slow
def test_the_last_checkpoint_is_the_trained_model_and_a_stopped_measurement_goes_on(folder: Path) -> None:
    whole = opsd("eval", "runs/r", "--step", "last", *SAMPLED, "run.name=whole", cwd=folder)
    assert whole.returncode == 0, whole.stderr
    assert "pass@2" in whole.stdout
    assert "maj@3" in whole.stdout
    # 6 problems of 3 completions, in parts of 8: stopped in the second part.
    cut = opsd("eval", "runs/r", *SAMPLED, "run.name=cut", cwd=folder, OPSD_FAULT="term@eval.decoded:2")
    assert cut.returncode == 143, cut.stderr
    assert "what was measured is kept; continue with: opsd eval --resume runs/cut" in cut.stderr
    kept = (folder / "runs/cut/evaluations/unfinished_test_student.jsonl").read_text().splitlines()
    assert len(kept) == 8
    assert opsd("train", "--resume", "runs/cut", cwd=folder).returncode == 2
    resumed = opsd("eval", "--resume", "runs/cut", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    # Adapter apart from the weights, or merged in float32; drawn at once or in two attempts: the same completions.
    assert measured(folder / "runs/cut") == measured(folder / "runs/whole")
    done = (folder / "runs/cut/evaluations/step_000000_test_student.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in done]
    assert len(lines) == 18
    assert all(any(one.items() <= line.items() for line in lines) for one in map(json.loads, kept))
    assert not list((folder / "runs/cut/evaluations").glob("unfinished*"))
    again = opsd("eval", "--resume", "runs/cut", cwd=folder)
    assert "is complete: there is nothing left to measure" in again.stderr


@pytest.mark.slow
def test_a_model_is_measured_as_another_run_was_and_compared_with_it(folder: Path) -> None:
    words = ("--against", "runs/r", "eval.second_grader=math_verify", "eval.teacher_prompt=false", "launcher.ranks=2")
    made = opsd("eval", "tiny", *words, cwd=folder)
    assert made.returncode == 0, made.stderr
    assert "eval-tiny-001 against r, the same 6 problems: " in made.stdout
    assert "disagree on" in made.stdout


def test_what_cannot_be_measured_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = {
        ("tiny", "recipe=quickstart", "eval.samples=4"): "every completion of a problem is the same",
        ("tiny", "recipe=quickstart", "eval.second_grader=math_verif"): "did you mean 'math_verify'",
        ("tiny", "recipe=quickstart", "eval.second_grader=reference"): "is the grader already",
        ("tiny", "--step", "3", "recipe=quickstart"): "--step is of a run, and tiny is none",
        ("tiny", "--against", "runs/nope"): "no run folder 'runs/nope'",
        ("tiny", "--limit", "3", "recipe=quickstart"): "--limit is for --tasks",
        ("--resume", "runs/nope", "x=1"): "takes nothing else",
    }
    for words, told in cases.items():
        assert main(["eval", *words]) == 2
        assert told in capsys.readouterr().err, words
    assert main(["train", "recipe=quickstart", "model.checkpoint=x"]) == 2
    assert "model.checkpoint is for `opsd eval` and `opsd generate`" in capsys.readouterr().err


def outcome(problem: str, said: str | None, *, correct: bool, sample: int = 0, second: bool | None = None) -> Outcome:
    return Outcome(problem, correct, said is not None, "stop", 10, f"... {said}", sample, said, second)


def test_several_completions_are_summed_up_over_problems() -> None:
    said = {"a": ["4", "4.0", "5"], "b": ["7", "7", None]}
    outcomes = [
        outcome(problem, answer, correct=answer in ("4", "4.0"), sample=n, second=False)
        for problem, answers in said.items()
        for n, answer in enumerate(answers)
    ]
    found = summed_up(outcomes, role="student", split="test", seconds=1.0)
    assert (found.problems, found.samples, found.correct, found.disagreements) == (2, 3, 2, 2)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.at_k is not None
    assert {name: value for name, (value, _, _) in found.at_k.items()} == pytest.approx(
        {"pass@2": 0.5, "maj@2": 1 / 3, "pass@3": 0.5, "maj@3": 0.5}
    )


def test_answers_that_mean_the_same_are_one_vote() -> None:
    said = [stated_by(text, "0.5") for text in ("It is 1/2.", "#### 0.50", "\\boxed{3}", "I do not know")]
    assert agreeing(said) == [[0, 1], [2]]


def test_shares_of_problems_are_compared_by_their_differences(tmp_path: Path) -> None:
    lines = [
        {"problem": p, "correct": c} for p, grades in {"a": [1, 0], "b": [1, 1]}.items() for c in map(bool, grades)
    ]
    write_lines(tmp_path / "x.jsonl", lines)
    assert {p: line["share"] for p, line in read_completions(tmp_path / "x.jsonl").items()} == {"a": 0.5, "b": 1.0}
    first = {str(n): 0.25 for n in range(20)}
    found = compare(first, {problem: 0.5 if int(problem) % 2 else 0.75 for problem in first})
    assert found is not None
    assert found.gain == pytest.approx(0.375)
    assert found.low < 0.375 < found.high < 0.5
    assert (len(found.won), found.lost) == (20, ())


def test_the_second_grader_reads_completions_by_itself() -> None:
    grader = MathVerify()
    try:
        pairs = [
            ("So it is $\\frac{1}{2}$.", ["0.5"]), ("The answer is 12.", ["12"]), ("The answer is 13.", ["12"]),
            ("I do not know", ["12"]), ("it is 4", ["3", "4"]),
        ]  # fmt: skip
        grades = grader.grade(pairs)
    finally:
        grader.close()
    assert [grade.correct for grade in grades] == [True, True, False, False, True]
    assert [grade.stated for grade in grades] == [True, True, True, False, True]


def test_what_the_harness_writes_is_read_and_compared_in_pairs(tmp_path: Path) -> None:
    """Files as lm-evaluation-harness 0.4.13 writes them."""
    for name, right in {"before": [1.0, 0.0, 0.0], "after": [1.0, 1.0, 0.0]}.items():
        folder = tmp_path / name / "out__model"
        folder.mkdir(parents=True)
        metrics = {"alias": "sums", "exact_match,last": sum(right) / 3, "exact_match_stderr,last": 0.3, "sample_len": 3}
        (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps({"results": {"sums": metrics}}))
        lines = [json.dumps({"doc_id": n, "filter": "last", "exact_match": value}) for n, value in enumerate(right)]
        (folder / "samples_sums_2026-01-01T00-00-00.jsonl").write_text("\n".join(lines) + "\n")
    before, after = (list(read_scores(tmp_path / name)) for name in ("before", "after"))
    ((first, last, comparison),) = against(before, after)
    assert (first.value, last.value, last.error) == pytest.approx((1 / 3, 2 / 3, 0.3))
    assert comparison is not None
    assert (comparison.won, comparison.lost) == (("1",), ())


def test_items_of_a_task_are_not_those_of_one_whose_name_goes_on(tmp_path: Path) -> None:
    """A line holds what the harness was given, such as U+2028, which breaks none."""
    results = {"results": {name: {"exact_match,none": 0.5} for name in ("sums", "sums_cot")}}
    (tmp_path / "results_2026-01-01T00-00-00.json").write_text(json.dumps(results))
    for name, right in {"sums": 1.0, "sums_cot": 0.0}.items():
        item = {"doc_id": 0, "filter": "none", "exact_match": right, "doc": "a\u2028b"}
        (tmp_path / f"samples_{name}_2026-01-01T00-00-00.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n")
    assert {score.task: score.items for score in read_scores(tmp_path)} == {"sums": {"0": 1.0}, "sums_cot": {"0": 0.0}}
