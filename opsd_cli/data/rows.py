"""Tables of rows -> checked problems, with every message about an invalid row."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd_cli.data.answer_marks import marked_answer
from opsd_cli.data.cells import (
    CellError,
    accepted_answers,
    cell,
    column_of,
    names_in,
    question_cell,
    shown_cell,
    solution_cell,
    text_cell,
)
from opsd_cli.data.files import Table
from opsd_cli.data.problems import Problem
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.registry import did_you_mean

SHOWN_ROWS = 3
MAX_COLUMNS_SHOWN = 20


@dataclass(frozen=True)
class FieldMap:
    """Which column holds what; `a.b` is b inside a. Without `answer` it is found in the solution; without `solution`
    nothing is shown or trained on; without `id` the row number serves."""

    question: str
    solution: str | None
    answer: str | None = None
    id: str | None = None
    shown: tuple[str, ...] = ()  # further columns, which a context shows

    @property
    def columns(self) -> tuple[str, ...]:
        own = (self.question, self.solution, self.answer, self.id)
        return (*(name for name in own if name is not None), *self.shown)


@dataclass(frozen=True)
class Read:
    """The problems of a table, and a line about what was left out of it, or nothing."""

    problems: tuple[Problem, ...]
    left_out: str


def problems_of(table: Table, fields: FieldMap, *, split: str, bad_share: float = 0.0) -> Read:
    """Every row as a Problem, outer white space stripped, ids `SPLIT-ID`; at most `bad_share` of the rows may be left
    out as unusable. Where no solution has a marked answer, and no column is named, the problems have none. Raises
    DataError that names what is wrong with which rows (the first three and how many more), the available columns, and
    a similar name for a missing one."""
    if not table.rows:
        raise DataError(f"{table.where}: no rows")
    _check_columns(table, fields)
    faults: dict[str, list[str]] = defaultdict(list)
    problems: list[Problem] = []
    first_row_of: dict[str, str] = {}
    single = len({file for file, _ in table.rows}) == 1
    for place, (file, (number, values)) in enumerate(table.rows, start=1):
        row = str(number) if single else f"{file}:{number}"
        try:
            if isinstance(values, str):
                raise CellError(values)
            problem = _problem(number if single else place, values, fields=fields, split=split)
        except CellError as error:
            faults[str(error)].append(row)
            continue
        if (first := first_row_of.setdefault(problem.id, row)) != row:
            faults[f"duplicate id {problem.id!r} (first in row {first})"].append(row)
            continue
        problems.append(problem)
    if fields.answer is None and any(problem.answer is not None for problem in problems):
        unmarked = f"{fields.solution} has no `#### x` or \\boxed{{x}}, and dataset.answer_field is null"
        rows_of = {problem.id: row for row, problem in zip(first_row_of.values(), problems, strict=True)}
        faults[unmarked] += [rows_of[problem.id] for problem in problems if problem.answer is None]
        problems = [problem for problem in problems if problem.answer is not None]
    return Read(tuple(problems), _left_out(table, {fault: rows for fault, rows in faults.items() if rows}, bad_share))


def _check_columns(table: Table, fields: FieldMap) -> None:
    """Raises DataError for a name that no row has."""
    rows = [values for _, (_, values) in table.rows if isinstance(values, dict)]
    nested = tuple(dict.fromkeys(name for values in rows[:SHOWN_ROWS] for name in names_in(values)))
    known = tuple(dict.fromkeys((*table.columns, *nested)))
    missing = [
        name
        for name in dict.fromkeys(fields.columns)
        if column_of(name, table.columns) not in table.columns
        or (name not in table.columns and all(cell(values, name) is None for values in rows))
    ]
    if not rows or not missing:
        return
    wanted = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in missing)
    way_out = "set dataset.question_field, solution_field, answer_field, id_field"
    if fields.solution in missing:
        way_out += " (dataset.solution_field=null: there is none)"
    if not {*missing} - {*fields.shown}:
        way_out = "show another one in the context: {{row.COLUMN}}"
    if fields.answer in missing:
        way_out += " (dataset.answer_field=null finds the answer in the solution, or trains without one)"
    raise DataError(f"{table.where}: no column {wanted}; columns found: {_listed(known)}; {way_out}")


def _problem(number: int, values: dict[str, Any], *, fields: FieldMap, split: str) -> Problem:
    """The problem of one row. Raises CellError, which names the column."""
    question, system, earlier = _read(question_cell, values, fields.question)
    solution = "" if fields.solution is None else _read(solution_cell, values, fields.solution)
    if fields.answer is None:
        marked = marked_answer(solution)
        answers: tuple[str, ...] = () if marked is None else (marked,)
    else:
        answers = _read(accepted_answers, values, fields.answer)
    key = f"{number:05d}" if fields.id is None else _read(_id_cell, values, fields.id)
    return Problem(
        id=f"{split}-{key}",
        question=question,
        solution=solution,
        answer=answers[0] if answers else None,
        also_right=answers[1:],
        system=system,
        earlier=earlier,
        columns=tuple((name, _read(shown_cell, values, name)) for name in fields.shown),
    )


def _id_cell(value: object) -> str:
    return text_cell(value, number_allowed=True)


def _read(read: Any, values: dict[str, Any], name: str) -> Any:
    try:
        return read(cell(values, name))
    except CellError as error:
        raise CellError(f"{name} {error}") from None


def _left_out(table: Table, faults: dict[str, list[str]], allowed: float) -> str:
    """What was left out, in words. Raises DataError where that is more than is allowed."""
    bad, total = sum(map(len, faults.values())), len(table.rows)
    if not bad:
        return ""
    described = _fault_line(table, faults)
    if bad > allowed * total or bad == total:
        if allowed > 0:
            described += f"; {bad} of {total} rows, above dataset.max_bad_share={allowed:g}"
        elif bad <= 0.2 * total:
            described += f"; dataset.max_bad_share={_enough(bad / total)} leaves {bad} of {total} rows out"
        raise DataError(described)
    return f"{bad} of {total} rows left out: {described}"


def _enough(share: float) -> str:
    """The share, rounded up to two digits."""
    return f"{max(0.01, -(-share * 100 // 1) / 100):g}"


def _fault_line(table: Table, faults: dict[str, list[str]]) -> str:
    if len(faults) == 1 and all(len(rows) == 1 for rows in faults.values()):
        ((fault, rows),) = faults.items()
        if fault.startswith(("not ", "a row must", "NUL")) or " values, but the header" in fault:
            return f"{table.where if ':' not in rows[0] else ''}{':' if ':' not in rows[0] else ''}{rows[0]}: {fault}"
    parts = []
    for fault, numbers in faults.items():
        shown = ", ".join(numbers[:SHOWN_ROWS])
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
            fields: list[Any] = [problem.id, problem.question, problem.solution, problem.answer]
            # What most problems do not have is left out, so that their fingerprint stays what it was.
            fields += [[problem.also_right, problem.system]] if problem.also_right or problem.system else []
            fields += [problem.earlier] if problem.earlier else []
            fields += [[problem.columns]] if problem.columns else []
            digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()
