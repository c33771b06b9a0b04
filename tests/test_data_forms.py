"""The forms that data come in, each a file: what people have is read, and what cannot be used is counted or refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dataset_support import jsonl, message, write_rows

from opsd_cli.data.problems import Problem

ROWS = [{"question": f"What is {i}+1?", "solution": f"#### {i + 1}", "answer": str(i + 1)} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def save_to_disk(path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(ROWS[:3]), test=Dataset.from_list(ROWS[3:])).save_to_disk(str(path))


def write_shards(path: Path) -> None:
    for i, row in enumerate(ROWS[:3]):
        write_parquet(path / "data" / f"train-{i:05d}-of-00003.parquet", [row])
    write_parquet(path / "data" / "test-00000-of-00001.parquet", ROWS[3:])


def write_split_folders(path: Path) -> None:
    for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        (path / split).mkdir(parents=True)
        write_rows(path / split / "part1.jsonl", *rows)


FORMS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lines of JSON": ("rows.jsonl", lambda path: path.write_text(LINES)),
    "lines of JSON, compressed": ("rows.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
    "lines of JSON, bz2": ("rows.jsonl.bz2", lambda path: path.write_bytes(bz2.compress(LINES.encode()))),
    "a list in JSON": ("rows.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
    "a list in JSON under a key": ("rows.json", lambda path: path.write_text(json.dumps({"v": 1, "data": ROWS}))),
    "lines of JSON, called JSON": ("rows.json", lambda path: path.write_text(LINES)),
    "CSV": ("rows.csv", write_csv),
    "TSV": ("rows.tsv", lambda path: write_csv(path, "\t")),
    "Parquet": ("rows.parquet", write_parquet),
    "shards as on the hub": ("folder", write_shards),
    "a folder for each split": ("folder", write_split_folders),
    "a folder of save_to_disk": ("folder", save_to_disk),
    "a folder with one file": ("folder", lambda path: write_parquet(path / "rows.parquet")),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_rows_gives_the_same_problems(tmp_path: Path, form: str) -> None:
    name, write = FORMS[form]
    write(tmp_path / name)
    splits = jsonl(tmp_path / name, test_problems=1).load()
    assert [(p.question, p.solution, p.answer) for p in (*splits.train, *splits.test)] == [
        tuple(row.values()) for row in ROWS
    ]
    assert (len(splits.train), len(splits.test)) == (3, 1)


def test_a_glob_names_files_and_tells_splits_apart(tmp_path: Path) -> None:
    write_shards(tmp_path)
    splits = jsonl(tmp_path / "data" / "*.parquet").load()
    assert (len(splits.train), len(splits.test)) == (3, 1)
    assert len({problem.id for problem in splits.train}) == 3
    assert "no file matches" in message(jsonl(tmp_path / "data" / "*.csv"))


def only(path: Path, row: dict[str, Any], **fields: Any) -> Problem:
    write_rows(path / "rows.jsonl", row)
    return jsonl(path / "rows.jsonl", test_problems=0, **fields).load().train[0]


def test_columns_inside_columns_and_chat_messages_are_read(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4"}, "hint": "count"}
    fields = {"question_field": "prompt", "solution_field": "hint", "answer_field": "reward_model.ground_truth"}
    problem = only(tmp_path, row, **fields)
    assert (problem.question, problem.solution, problem.answer) == ("2+2?", "count", "4")
    fields["answer_field"] = "reward_model.ground_trut"
    assert "did you mean 'reward_model.ground_truth'?" in message(jsonl(tmp_path / "rows.jsonl", **fields))


@pytest.mark.parametrize("keys", [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")])
def test_a_conversation_is_a_system_message_a_question_and_a_solution(tmp_path: Path, keys: tuple[str, ...]) -> None:
    role, content, user, assistant = keys
    said = [("system", "Be brief."), (user, "2+2?"), (assistant, "It is #### 4")]
    row = {"messages": [{role: who, content: text} for who, text in said]}
    fields: dict[str, Any] = {"question_field": "messages", "solution_field": "messages", "answer_field": None}
    problem = only(tmp_path, row, **fields)
    assert (problem.system, problem.question, problem.solution) == ("Be brief.", "2+2?", "It is #### 4")
    row["messages"][1:1] = [{role: user, content: "1+1?"}, {role: assistant, content: "2"}]
    problem = only(tmp_path, row, **fields)
    assert (problem.system, problem.question, problem.solution) == ("Be brief.", "2+2?", "It is #### 4")
    assert problem.earlier == (("user", "1+1?"), ("assistant", "2"))
    del row["messages"][2]
    write_rows(tmp_path / "rows.jsonl", row)
    assert "has the messages system user user; a conversation is taken" in message(
        jsonl(tmp_path / "rows.jsonl", **fields)
    )


def test_rows_may_have_an_answer_and_no_solution_or_neither(tmp_path: Path) -> None:
    problem = only(tmp_path, {"question": "2+2?", "answer": 4}, solution_field=None, answer_field="answer")
    assert (problem.solution, problem.accepted) == ("", ("4",))
    assert only(tmp_path, {"question": "2+2?"}, solution_field=None, answer_field=None).accepted == ()
    assert "dataset.solution_field=null" in message(jsonl(tmp_path / "rows.jsonl", answer_field=None))


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        (2, ("2",)),
        (2.5, ("2.5",)),
        (True, ("true",)),
        (["USA", "United States"], ("USA", "United States")),
        ([1, 2.0], ("1", "2.0")),
        ("2", ("2",)),
    ],
)
def test_an_answer_may_be_typed_or_a_list_of_accepted_ones(
    tmp_path: Path, value: object, accepted: tuple[str, ...]
) -> None:
    assert only(tmp_path, {**ROWS[0], "answer": value}).accepted == accepted


def test_numbers_of_32_bits_are_read_as_they_were_written(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    answers = pyarrow.array([0.1, 1.1, 2.5], pyarrow.float32())
    nested = pyarrow.array([{"truth": x} for x in (0.1, 1.1, 2.5)], pyarrow.struct([("truth", pyarrow.float32())]))
    columns = {"question": ["a", "b", "c"], "solution": ["#### 0.1", "#### 1.1", "#### 2.5"]}
    parquet.write_table(pyarrow.table({**columns, "answer": answers, "nested": nested}), tmp_path / "rows.parquet")
    for field in ("answer", "nested.truth"):
        train = jsonl(tmp_path / "rows.parquet", answer_field=field, test_problems=0).load().train
        assert [problem.answer for problem in train] == ["0.1", "1.1", "2.5"]


def test_decimals_and_dates_are_written_out(tmp_path: Path) -> None:
    from datetime import date
    from decimal import Decimal

    rows = [{**ROWS[0], "answer": value} for value in (Decimal("1.50"),)]
    write_parquet(tmp_path / "decimals.parquet", rows)
    write_parquet(tmp_path / "dates.parquet", [{**ROWS[0], "answer": date(2024, 3, 5)}])
    for name, answer in (("decimals", "1.50"), ("dates", "2024-03-05")):
        assert jsonl(tmp_path / f"{name}.parquet", test_problems=0).load().train[0].answer == answer


def test_data_without_a_marked_answer_have_none(tmp_path: Path) -> None:
    rows = [{"input": f"Summarise {i}.", "output": f"Summary {i} of 20."} for i in range(4)]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    fields: dict[str, Any] = {"question_field": "input", "solution_field": "output"}
    train = jsonl(file, **fields, answer_field=None, test_problems=0).load().train
    assert [problem.answer for problem in train] == [None] * 4
    assert [problem.accepted for problem in train] == [()] * 4
    said = message(jsonl(file, **fields))
    assert "no column 'answer'" in said
    assert "dataset.answer_field=null" in said


def test_bad_rows_are_left_out_up_to_the_share_that_is_allowed_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(LINES * 5 + '{"question": "x", "solution": "", "answer": null}\n{"question": oops\n')
    assert "dataset.max_bad_share=0.1 leaves 2 of 22 rows out" in message(jsonl(file))
    assert "2 of 22 rows, above dataset.max_bad_share=0.05" in message(jsonl(file, max_bad_share=0.05))
    splits = jsonl(file, max_bad_share=0.1, test_problems=0).load()
    assert len(splits.train) == 20
    (left_out,) = splits.left_out
    assert left_out.startswith(f"2 of 22 rows left out: {file}: solution is empty: row 21; not JSON")


def test_duplicate_ids_are_bad_rows_too(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "id": i} for i in (1, 2, 3, 4, 1)]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    splits = jsonl(file, id_field="id", max_bad_share=0.2, test_problems=0).load()
    assert [problem.id for problem in splits.train] == ["train-1", "train-2", "train-3", "train-4"]


def test_a_broken_archive_and_a_broken_saved_folder_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:40])
    assert "cannot be read" in message(jsonl(tmp_path / "rows.jsonl.gz"))
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no archive")
    assert "cannot be read" in message(jsonl(tmp_path / "rows.jsonl.gz"))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_text("{}")
    assert "dataset.path=" in message(jsonl(saved))
