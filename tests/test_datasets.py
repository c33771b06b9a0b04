"""Reading problems: real GSM8K, and files of every kind and every way to be broken."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from dataset_support import gsm8k, jsonl, message, needs_gsm8k, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsd_cli.data.datasets import divide
from opsd_cli.data.files import read_table
from opsd_cli.data.problems import Problem
from opsd_cli.data.rows import FieldMap, fingerprint, problems_of

ROW = {"question": "How many?", "solution": "One and one.\n#### 2", "answer": "2"}


@needs_gsm8k
def test_gsm8k_gives_worked_solutions_and_their_numbers() -> None:
    splits = gsm8k().load()
    first = splits.train[0]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (7273, 200, 660)
    assert first.question.startswith("Natalia sold clips")
    assert first.answer == "72"
    assert first.solution.endswith("#### 72")
    assert "<<48/2=24>>" in first.solution
    everything = [*splits.train, *splits.validation, *splits.test]
    assert len({problem.id for problem in everything}) == len(everything)
    assert all(problem.solution and problem.answer for problem in everything)


@needs_gsm8k
def test_validation_is_the_end_of_train_and_train_can_be_limited() -> None:
    whole, part = gsm8k(validation_problems=0).load(), gsm8k(train_problems=5).load()
    assert [*part.train] == [*whole.train[:5]]
    assert [*part.validation] == [*whole.train[-200:]]
    assert part.fingerprint != whole.fingerprint


def test_a_gsm8k_folder_without_its_files_names_the_missing_one(tmp_path: Path) -> None:
    assert "no file train.jsonl there" in message(gsm8k(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"question": "a", "solution": "b", "answer": "1"}\n{"question": "a", oops}\n', ":2: not JSON: "),
        (b'{"question": "a", "solution": "b", "answer": "1"', ":1: not JSON: "),
        (b'["question"]\n', ":1: a row must be a JSON object, got '[\"question\"]'"),
        (b'\n\n{"question": "\xff"}\n', ":3: not UTF-8: byte 0xff at column 15"),
        (b'{"question": "a\0b"}\n', ":1: NUL byte at column 16"),
        ('{"question": "a"}\n'.encode("utf-16"), ":1: the file is UTF-16"),
        (b'{"question": ' + b"[" * 100_000 + b"\n", ":1: not usable JSON"),
        (b'{"question": ' + b"9" * 5000 + b"}\n", ":1: not usable JSON"),
        (b"", ": no rows"),
        (b"\n\n", ": no rows"),
        (b"\xef\xbb\xbf", ": no rows"),
    ],
    ids=range(11),
)
def test_a_broken_file_is_answered_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(content)
    text = message(jsonl(file))
    assert text.startswith(str(file) + said)
    assert len(text) < 400


def test_a_missing_column_is_answered_with_those_found_and_the_nearest(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", {"qestion": "a", "solution": "b", "answer": "1"})
    text = message(jsonl(file))
    assert "no column 'question' - did you mean 'qestion'?" in text
    assert "columns found: qestion, solution, answer" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": None}, "answer is missing or null: rows 2, 3, 4 and 2 more"),
        ({"question": 5}, "question is int, not text: rows 2, 3, 4 and 2 more"),
        ({"question": ["a"]}, "question is list, not text"),
        ({"answer": {"a": 1}}, "answer is dict, not text"),
        ({"answer": []}, "answer is an empty list"),
        ({"answer": float("nan")}, "answer is nan"),
        ({"solution": "  \n"}, "solution is empty"),
        ({"question": "a\0b"}, "question holds a NUL or half a surrogate pair"),
        ({"question": "a\ud800"}, "question holds a NUL or half a surrogate pair"),
    ],
    ids=range(9),
)
def test_bad_cells_are_listed_by_row_the_first_three_and_how_many(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROW, *[{**ROW, **change}] * 5)
    assert said in message(jsonl(file))


def test_duplicate_ids_are_refused_with_both_rows(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", {**ROW, "id": 7}, {**ROW, "id": 8}, {**ROW, "id": "7"})
    assert "duplicate id 'train-7' (first in row 1): row 3" in message(jsonl(file, id_field="id"))


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + (json.dumps(ROW) + "\r\n" + json.dumps(ROW) + "\r\n").encode())
    splits = jsonl(file, test_problems=0).load()
    assert [problem.id for problem in splits.train] == ["train-00001", "train-00002"]
    assert splits.train[0].question == "How many?"


def test_a_line_of_ten_megabytes_is_read_and_a_longer_one_than_the_cap_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", {**ROW, "question": "x" * 10_000_000})
    assert len(jsonl(file).load().train[0].question) == 10_000_000
    file.write_bytes(b'{"question": "' + b"x" * (65 * 2**20) + b'"}')
    assert "longer than 64 MiB" in message(jsonl(file))


def test_numbers_serve_as_answers_and_ids(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", {**ROW, "answer": 2, "id": 5}, {**ROW, "answer": 2.5, "id": 6})
    problems = jsonl(file, id_field="id", test_problems=0).load().train
    assert [(problem.id, problem.answer) for problem in problems] == [("train-5", "2"), ("train-6", "2.5")]


def test_the_answer_is_found_in_the_solution_when_there_is_no_column(tmp_path: Path) -> None:
    boxed = {"question": "q", "solution": r"so \boxed{\frac{1}{2}}"}
    file = write_rows(tmp_path / "rows.jsonl", {"question": "q", "solution": "x\n#### 1,080"}, boxed)
    problems = jsonl(file, answer_field=None, test_problems=0).load().train
    assert [problem.answer for problem in problems] == ["1,080", r"\frac{1}{2}"]
    write_rows(file, {"question": "q", "solution": "just words"}, boxed)
    assert "solution has no `#### x` or \\boxed{x}" in message(jsonl(file, answer_field=None))


def test_a_folder_gives_its_splits_whatever_their_kind(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    write_rows(tmp_path / "train.jsonl", ROW, ROW)
    with open(tmp_path / "validation.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows([ROW, {**ROW, "question": 'two\nlines, "quoted"'}])
    parquet.write_table(pyarrow.table({name: [text] * 3 for name, text in ROW.items()}), tmp_path / "test.parquet")
    splits = jsonl(tmp_path, validation_problems=1).load()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2, 1, 3)
    assert jsonl(tmp_path).load().validation[1].question == 'two\nlines, "quoted"'
    assert splits.test[2].solution == ROW["solution"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("question,solution,answer\na,b\n", ":2: 2 values, but the header has 3 columns"),
        ("question,question,answer\na,b,c\n", ":1: duplicate column 'question' in the header"),
        ('question,solution,answer\na,b,c\n"a,b,c\n', ":3: not CSV"),
        ("question,solution,answer\n", ": no rows"),
    ],
)
def test_a_broken_csv_file_is_answered_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(content)
    assert message(jsonl(file)).startswith(str(file) + said)


def test_a_broken_parquet_file_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    assert "not a readable Parquet file" in message(jsonl(tmp_path / "rows.parquet"))
    (tmp_path / "rows.txt").write_text("a")
    assert "must end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet" in message(jsonl(tmp_path / "rows.txt"))


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in message(jsonl(tmp_path / "nothing"))
    assert "no train file there" in message(jsonl(tmp_path))
    write_rows(tmp_path / "train.jsonl", ROW)
    (tmp_path / "train.csv").write_text("question,solution,answer\na,b,c\n")
    assert "train.csv and train.jsonl are both there" in message(jsonl(tmp_path))


def test_splits_taken_from_train_are_disjoint_and_leave_something(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *[{**ROW, "question": str(i)} for i in range(10)])
    splits = jsonl(file, validation_problems=3, test_problems=2).load()
    read = [[int(problem.question) for problem in s] for s in (splits.train, splits.validation, splits.test)]
    assert read == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]
    text = message(jsonl(file, validation_problems=10))
    assert "lower dataset.validation_problems" in text


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (10, 1), (40, 4), (5000, 256)])
def test_a_tenth_of_a_single_file_is_held_out_where_nobody_says_how_much(
    tmp_path: Path, rows: int, held_out: int
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *[{**ROW, "question": str(i)} for i in range(rows)])
    splits = jsonl(file).load()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (rows - held_out, 0, held_out)
    assert splits.test[-1].question == str(rows - 1)
    assert splits.source == f"{file}, of it the last {held_out} as test"
    assert jsonl(file, test_problems=0).load().test == ()


def test_one_row_is_a_dataset(tmp_path: Path) -> None:
    splits = jsonl(write_rows(tmp_path / "rows.jsonl", ROW)).load()
    assert (len(splits.train), splits.validation, splits.test) == (1, (), ())


def test_the_fingerprint_sees_every_field_the_order_and_the_split() -> None:
    a, b = Problem("1", "q", "s", "a"), Problem("2", "q", "s", "a")
    prints = [
        fingerprint([a, b], []),
        fingerprint([b, a], []),
        fingerprint([a], [b]),
        fingerprint([a, Problem("2", "q", "s", "b")], []),
        fingerprint([a, Problem("2", "qs", "", "a")], []),
    ]
    assert len(set(prints)) == len(prints)
    assert divide({"train": (a, b)}, {"train": None, "validation": 0, "test": 0}, source="").fingerprint == fingerprint(
        [a, b], [], []
    )


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).filter(
    lambda text: bool(text.strip())
)


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=8), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_as_jsonl_is_read_back(
    tmp_path: Path, rows: list[tuple[str, str, str]], ascii_only: bool
) -> None:
    names = ("question", "solution", "answer")
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=ascii_only) + "\n" for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(lines), encoding="utf-8", newline="")
    problems = problems_of(read_table(file, names), FieldMap(*names), split="train").problems
    assert [(p.question, p.solution, p.answer) for p in problems] == [tuple(t.strip() for t in row) for row in rows]


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    for ending in ("jsonl", "csv"):
        file = tmp_path / f"rows.{ending}"
        file.write_bytes(content)
        message(jsonl(file))
