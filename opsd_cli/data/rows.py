"""Files of rows (JSONL, CSV, Parquet) -> checked problems, with every message about an invalid row.

The readers of the `datasets` library would do the reading; they name neither line nor column of what they refuse.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_cli.data.answer_marks import marked_answer
from opsd_cli.data.problems import Problem
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.registry import did_you_mean

Row = tuple[int, dict[str, Any]]
"""Line number of a row (JSONL and CSV, else counted from 1) and its values."""

MAX_LINE_BYTES = 64 * 2**20
SHOWN_ROWS = 3
MAX_COLUMNS_SHOWN = 20
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and half a surrogate pair, which no encoding can write


@dataclass(frozen=True)
class FieldMap:
    """Which column holds what. Without `answer` it is found in the solution; without `id` the row number serves."""

    question: str
    solution: str
    answer: str | None = None
    id: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in (self.question, self.solution, self.answer, self.id) if name is not None)


@dataclass(frozen=True)
class Table:
    """Rows as read, with their name in messages and every column that any row has."""

    where: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: Path, keep: Sequence[str]) -> Table:
    """The rows of a .jsonl, .csv or .parquet file, only the columns in `keep`. Raises DataError with file and line."""
    if (reader := READERS.get(path.suffix.lower())) is None:
        raise DataError(f"{path}: cannot read this kind of file; it must end in {', '.join(READERS)}")
    columns: dict[str, None] = {}
    rows: list[Row] = []
    try:
        for number, values in reader(path):
            columns.update(dict.fromkeys(values))
            rows.append((number, {name: values[name] for name in keep if name in values}))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return Table(str(path), tuple(columns), tuple(rows))


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, text in _text_lines(path):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            near = text[max(0, error.colno - 30) : error.colno + 30].strip()
            what = f"not JSON: {error.msg} at column {error.colno}, near {near!r}"
            raise DataError(f"{path}:{number}: {what}") from None
        except (ValueError, RecursionError) as error:
            what = f"not usable JSON: {first_line(error)}, in {text[:60].strip()!r}"
            raise DataError(f"{path}:{number}: {what}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: a row must be a JSON object, got {text[:60].strip()!r}")
        yield number, value


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, decoded one by one so that a bad byte names its line."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: line is longer than {MAX_LINE_BYTES // 2**20} MiB, the most allowed")
            if number == 1 and line.startswith(UTF16_BOMS):
                raise DataError(f"{path}:1: the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(UTF8_BOM) if number == 1 else line
            if b"\0" in line:
                column = line.index(0) + 1
                raise DataError(f"{path}:{number}: NUL byte at column {column}; the file is damaged or not text")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                got = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
                raise DataError(f"{path}:{number}: not UTF-8: {got}; save the file as UTF-8") from None


def _csv_rows(path: Path) -> Iterator[Row]:
    # The csv module allows fields of 128 KiB; its limit can only be raised for the whole process.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((text for _, text in _text_lines(path)), strict=True)
    header: list[str] = []
    started = 1
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{started}: not CSV: {error}") from None
        if record is None:
            return
        if record and not header:
            header = record
            if repeated := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{path}:1: duplicate column {repeated[0]!r} in the header")
        elif record:
            if len(record) != len(header):
                got = f"{len(record)} values, but the header has {len(header)} columns"
                raise DataError(f"{path}:{started}: {got}; quote commas in text")
            yield started, dict(zip(header, record, strict=True))
        started = reader.line_num + 1


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate((values for batch in batches for values in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def problems_of(table: Table, fields: FieldMap, *, split: str) -> tuple[Problem, ...]:
    """Every row as a Problem, outer white space stripped, ids `SPLIT-ID`. Raises DataError that names what is wrong
    with which rows (the first three and how many more), the available columns, and a similar name for a missing one."""
    if not table.rows:
        raise DataError(f"{table.where}: no rows")
    missing = [name for name in dict.fromkeys(fields.columns) if name not in table.columns]
    if missing:
        wanted = ", ".join(f"{name!r}{did_you_mean(name, table.columns)}" for name in missing)
        raise DataError(
            f"{table.where}: no column {wanted}; columns found: {_listed(table.columns)}; "
            "set dataset.question_field, solution_field, answer_field, id_field"
        )
    faults: dict[str, list[int]] = defaultdict(list)
    problems: list[Problem] = []
    first_row_of: dict[str, int] = {}
    for number, values in table.rows:
        problem = _problem(number, values, fields=fields, split=split)
        if isinstance(problem, str):
            faults[problem].append(number)
            continue
        if (first := first_row_of.setdefault(problem.id, number)) != number:
            faults[f"duplicate id {problem.id!r} (first in row {first})"].append(number)
        problems.append(problem)
    if faults:
        raise DataError(_fault_line(table, faults))
    return tuple(problems)


def _problem(number: int, values: dict[str, Any], *, fields: FieldMap, split: str) -> Problem | str:
    """The problem of one row, or what is wrong with it."""
    texts: dict[str, str] = {}
    for name in dict.fromkeys(fields.columns):
        text, fault = _text(values.get(name), number_allowed=name in (fields.answer, fields.id))
        if fault is not None:
            return f"{name} {fault}"
        texts[name] = text
    solution = texts[fields.solution]
    answer = texts[fields.answer] if fields.answer is not None else marked_answer(solution)
    if answer is None:
        return f"{fields.solution} has no `#### x` or \\boxed{{x}}, and dataset.answer_field is null"
    key = texts[fields.id] if fields.id is not None else f"{number:05d}"
    return Problem(f"{split}-{key}", texts[fields.question], solution, answer)


def _text(value: object, *, number_allowed: bool) -> tuple[str, str | None]:
    """A cell as stripped text, and what is wrong with it or None."""
    if value is None:
        return "", "is missing or null"
    if number_allowed and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return "", f"is {value}"
        value = repr(value)
    if not isinstance(value, str):
        return "", f"is {type(value).__name__}, not text"
    text = value.strip()
    if not text:
        return "", "is empty"
    if UNUSABLE.search(text):
        return "", "holds a NUL or half a surrogate pair"
    return text, None


def _fault_line(table: Table, faults: dict[str, list[int]]) -> str:
    parts = []
    for fault, numbers in faults.items():
        shown = ", ".join(str(number) for number in numbers[:SHOWN_ROWS])
        more = f" and {len(numbers) - SHOWN_ROWS} more" if len(numbers) > SHOWN_ROWS else ""
        parts.append(f"{fault}: row{'s' if len(numbers) > 1 else ''} {shown}{more}")
    if len(parts) > SHOWN_ROWS:
        parts[SHOWN_ROWS:] = [f"and {len(parts) - SHOWN_ROWS} other faults"]
    return f"{table.where}: {'; '.join(parts)}; columns found: {_listed(table.columns)}"


def _listed(columns: Sequence[str]) -> str:
    shown = [name if name.isprintable() else repr(name) for name in columns[:MAX_COLUMNS_SHOWN]]
    return ", ".join(shown) + (", ..." if len(columns) > MAX_COLUMNS_SHOWN else "")


def fingerprint(*splits: Sequence[Problem]) -> str:
    """sha256 over every problem in order, and over the length of each split."""
    digest = hashlib.sha256()
    for problems in splits:
        digest.update(f"{len(problems)}\n".encode())
        for problem in problems:
            fields = [problem.id, problem.question, problem.solution, problem.answer]
            digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
