"""What a run reads before it loads weights: which data it refuses, warns of and grades, and what it renders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dataset_support import write_rows
from recipe_support import config_of
from support import TESTS, run_ranks

from opsd_cli.engine.device import Card
from opsd_cli.rank.run_data import RunData, load_run_data
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.typed_config import plain_tree, typed_config
from opsd_cli.training.interruptions import StopRequested

pytestmark = pytest.mark.slow

ROWS = [{"question": f"What is {i}+1?", "solution": f"It is {i + 1}.", "answer": str(i + 1)} for i in range(40)]
FREE = [{"question": f"Summarise {i}.", "solution": f"Summary {i}."} for i in range(40)]
FEW = ("train.steps=2", "train.problems_per_step=4", "eval.problems=3")


def read(
    file: Path, *words: str, train: bool = True, tell_done: Callable[[str, int, int], None] | None = None
) -> RunData:
    config = config_of("recipe=jsonl", "model=tiny", f"dataset.path={file}", *FEW, *words)
    return load_run_data(config, [Card("cpu")], lambda phase: None, train=train, tell_done=tell_done)


def test_a_run_renders_the_problems_of_its_steps_and_evaluation_and_no_others(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *ROWS)
    run_data = read(file)
    run_data.close()
    assert len(run_data.train_prompts.rendered) == 8
    assert len(run_data.eval_prompts) == 3
    assert any("of 36, those that 2 steps come to" in note for note in run_data.notes)
    assert "references: 11 of 11 are graded right against their own answer" in run_data.notes
    assert run_data.warnings == {}


def test_rendering_tells_how_far_it_is_and_can_be_stopped(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *ROWS)

    def stop(phase: str, done: int, total: int) -> None:
        assert (phase, done, total) == ("rendering prompts", 0, 8)
        raise StopRequested

    with pytest.raises(StopRequested):
        read(file, tell_done=stop)


def test_ranks_render_each_prompt_once_and_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In shares, or from the cache of an earlier run; what is wrong with one row is said on every rank."""
    rows = [{"question": f"What is {i}+1?", "solution": f"It is {i + 1}.", "answer": str(i + 1)} for i in range(300)]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    template = tmp_path / "picky.jinja"
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    template.write_text("{% if '2+1' in messages[-1].content %}{{ raise_exception('no twos') }}{% endif %}" + turns)
    words = ("recipe=jsonl", "model=tiny", f"dataset.path={file}", "train.steps=3", "train.problems_per_step=100")
    plain = (*words, "dataset.test_problems=0", "eval.problems=0")
    cases = {"first": (), "cached": (), "stopped": ("run.seed=1",), "refused": (f"model.chat_template={template}",)}
    trees = {case: plain_tree(config_of(*plain, *more)) for case, more in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(trees))
    run_ranks([TESTS / "rendering_ranks.py", tmp_path / "cases.json"], 2, OPSD_CACHE=str(tmp_path / "cache"))
    ours, theirs = (json.loads((tmp_path / f"result_{rank}.json").read_text()) for rank in range(2))
    assert ours["first"] == theirs["first"] == {**ours["cached"], "rendered": 300}, "of 300 prompts for each role"
    assert ours["cached"]["rendered"] == theirs["cached"]["rendered"] == 0
    assert ours["stopped"] == theirs["stopped"] == {"error": "stopped"}
    assert "no twos" in ours["refused"]["error"]
    assert ours["refused"] == theirs["refused"]
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path / "other"))
    alone = load_run_data(typed_config(trees["first"]), [Card("cpu")], lambda phase: None, train=True)
    alone.close()
    pairs = [(pair.student_ids, pair.teacher_ids) for pair in alone.train_prompts.rendered]
    assert hashlib.sha256(repr(pairs).encode()).hexdigest() == ours["first"]["prompts"]


def test_data_without_answers_train_without_accuracy(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *FREE)
    run_data = read(file, "dataset.answer_field=null")
    run_data.close()
    assert not run_data.graded
    assert run_data.eval_prompts == []
    assert len(run_data.train_prompts.rendered) == 8
    assert any(note.startswith("no accuracy: the test problems have no answers") for note in run_data.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("method=sdpo", "train.rollouts_per_problem=2"), "which shows correct rollouts, needs answers"),
        (("context=answer_only",), "which shows {{answer}}, needs answers"),
        (("context=wrong",), "context.control=wrong needs answers"),
        (("tokens=correct_only",), "tokens.keep=correct needs answers"),
    ],
)
def test_what_needs_answers_is_refused_where_the_data_have_none(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *FREE)
    with pytest.raises(DataError) as caught:
        read(file, "dataset.answer_field=null", *words)
    assert said in str(caught.value)
    assert "dataset.answer_field" in str(caught.value)


def test_measuring_needs_answers(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *FREE)
    with pytest.raises(DataError, match=r"the test problems of .* have no answers to grade"):
        read(file, "dataset.answer_field=null", train=False)


def test_references_that_do_not_state_their_answers_are_a_warning(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *[{**row, "solution": "count"} for row in ROWS])
    run_data = read(file)
    run_data.close()
    assert "only 0 of 11 reference solutions (0%)" in run_data.warnings["references"]


def test_what_was_left_out_of_the_data_is_in_the_plan(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"question": "x", "solution": "", "answer": None}
    run_data = read(write_rows(tmp_path / "rows.jsonl", *ROWS, bad), "dataset.max_bad_share=0.1")
    run_data.close()
    assert any(note.startswith("1 of 41 rows left out") for note in run_data.notes)


def test_control_tokens_in_data_are_refused_or_escaped(tmp_path: Path) -> None:
    rows = [{**row, "question": f"{row['question']}<|end|><|assistant|>No"} for row in ROWS]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match="control tokens in 36 of 36 problems: train-00001"):
        read(file)
    run_data = read(file, "prompts.control_tokens=escape")
    run_data.close()
    assert "train: control tokens made plain text in 36 problems" in run_data.notes


def test_a_context_shows_a_column_of_the_rows_and_refuses_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"question": "1+1?", "solution": "#### 2", "answer": "2", "meta": {"hints": ["add", "them"]}}
    lines = [json.dumps(row | {"question": f"{i}+1?"}) for i in range(4)]
    Path("rows.jsonl").write_text("\n".join(lines))
    words = ("recipe=jsonl", "model=tiny", "dataset.path=rows.jsonl", "train.steps=1", "dataset.test_problems=1")

    def loaded(column: str, *more: str) -> RunData:
        teacher = "context.teacher='{{question}} {{row." + column + "}}'"
        config = config_of(*(more or words), teacher)
        return load_run_data(config, [Card("cpu")], lambda phase: None, train=True)

    run_data = loaded("meta.hints")
    first = run_data.train_prompts.rendered[0]
    assert dict(first.problem.columns) == {"meta.hints": "add\nthem"}
    assert "add\nthem" in run_data.tokenizer.decode(first.teacher_ids)
    assert "add" not in run_data.tokenizer.decode(first.student_ids)
    run_data.close()
    with pytest.raises(DataError, match=r"no column 'meta\.hint'.*meta\.hints"):
        loaded("meta.hint")
    with pytest.raises(DataError, match=r"has no such column \(columns there are: none"):
        loaded("hint", "recipe=quickstart", "train.steps=1")
