"""Files and folders -> tables of rows: JSONL, JSON, CSV, Parquet (also compressed), shards and globs as they lie on the
hub, and folders that the `datasets` library saved.

The readers of the `datasets` library would do the reading; they name neither line nor column of what they refuse.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import IO, Any

from opsd_cli.data.cells import column_of
from opsd_cli.settings.errors import DataError

Row = tuple[int, dict[str, Any] | str]
"""Line number of a row (JSONL and CSV, else counted from 1), and its values or what is wrong with it."""

MAX_LINE_BYTES = 64 * 2**20
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SPLIT_WORDS = {
    "train": re.compile(r"train(?:ing)?(?![a-z])", re.IGNORECASE),
    "validation": re.compile(r"(?:val|valid|validation|dev)(?![a-z])", re.IGNORECASE),
    "test": re.compile(r"(?:test|testing|eval|evaluation)(?![a-z])", re.IGNORECASE),
}
"""How the files of a split are called, as on the hub."""


@dataclass(frozen=True)
class Table:
    """Rows as read, with their name in messages and every column that any row has."""

    where: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, Row], ...]  # the file of each row, where there are several; and the row


# Which files --------------------------------------------------------------------------------------------------------


def split_files(path: str) -> dict[str, list[Path]]:
    """The files of each split that `path` names: a file, a glob, or a folder. Raises DataError."""
    here = Path(path)
    if here.is_file():
        return {"train": [here]}
    if here.is_dir():
        return _of_folder(here)
    if re.search(r"[*?\[]", path):
        found = sorted(Path(name) for name in glob(str(here), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"dataset.path={path}: no file matches")
        fixed = Path(*itertools.takewhile(lambda part: not re.search(r"[*?\[]", part), here.parts))
        splits = _by_split([(file, file.relative_to(fixed)) for file in found])
        return splits if "train" in splits else {"train": found}
    raise DataError(f"dataset.path={path}: no such file or folder")


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` made the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _of_folder(folder: Path) -> dict[str, list[Path]]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and reader_of(file) is not None]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    splits = _by_split([(file, file.relative_to(folder)) for file in files])
    for found in splits.values():
        stems = {file.name.removesuffix(ending_of(file)) for file in found}
        if len(found) > 1 and len(stems) < len(found) and len({file.parent for file in found}) == 1:
            names = " and ".join(file.name for file in found)
            raise DataError(f"dataset.path={folder}: {names} are both there; keep one")
    if "train" not in splits:
        if len(files) == 1:
            return {"train": files}
        raise DataError(f"dataset.path={folder}: no train file there (train{', train'.join(READERS)}, or shards)")
    return splits


def _by_split(files: Sequence[tuple[Path, Path]]) -> dict[str, list[Path]]:
    """The files by split: of each, the first part of its path that begins with a split's word decides."""
    splits: dict[str, list[Path]] = {}
    for file, shown in files:
        words = (split for part in shown.parts for split, is_of in SPLIT_WORDS.items() if is_of.match(part))
        if (split := next(words, None)) is not None:
            splits.setdefault(split, []).append(file)
    return splits


def ending_of(path: Path) -> str:
    """`.jsonl`, or `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes and suffixes[-1] in COMPRESSIONS else "".join(suffixes[-1:])


def reader_of(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    return READERS.get(ending_of(path).removesuffix(path.suffix.lower()) or path.suffix.lower())


# Reading ------------------------------------------------------------------------------------------------------------


def read_table(paths: Path | Sequence[Path], keep: Sequence[str]) -> Table:
    """The rows of files, only the columns in `keep`. Raises DataError for a file that cannot be read at all; what is
    wrong with one row stands in its place."""
    files = [paths] if isinstance(paths, Path) else list(paths)
    columns: dict[str, None] = {}
    rows: list[tuple[str, Row]] = []
    for file in files:
        if (reader := reader_of(file)) is None:
            known = ", ".join(READERS)
            raise DataError(f"{file}: cannot read this kind of file; it must end in {known} (or one of these and .gz)")
        try:
            for number, values in reader(file):
                if isinstance(values, str):
                    rows.append((str(file), (number, values)))
                    continue
                columns.update(dict.fromkeys(values))
                wanted = {column_of(name, tuple(values)) for name in keep}
                rows.append((str(file), (number, {name: values[name] for name in wanted if name in values})))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(f"{file}: cannot be read: {reason}") from None
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    return Table(where, tuple(columns), tuple(rows))


def _open(path: Path) -> IO[bytes]:
    opened = COMPRESSIONS.get(path.suffix.lower())
    return path.open("rb") if opened is None else opened(path, "rb")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, text in _text_lines(path):
        if isinstance(text, bytes):
            yield number, _undecodable(text)
        elif text.strip():
            yield number, _json_row(text)


def _json_row(text: str) -> dict[str, Any] | str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        near = text[max(0, error.colno - 30) : error.colno + 30].strip()
        return f"not JSON: {error.msg} at column {error.colno}, near {near!r}"
    except (ValueError, RecursionError) as error:
        return f"not usable JSON: {first_line(error)}, in {text[:60].strip()!r}"
    return value if isinstance(value, dict) else f"a row must be a JSON object, got {text[:60].strip()!r}"


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of objects; or an object that holds one list of objects; or lines, in a file with the wrong ending."""
    lines: list[str] = []
    for number, line in _text_lines(path):
        if isinstance(line, bytes):
            raise DataError(f"{path}:{number}: {_undecodable(line)}")
        lines.append(line)
    text = "".join(lines)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "{":
            yield from _jsonl_rows(path)
            return
        raise DataError(f"{path}: not JSON: {first_line(error)}") from None
    if isinstance(value, dict):
        lists = [inside for inside in value.values() if isinstance(inside, list) and inside]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: must hold a list of JSON objects, got {text[:60].strip()!r}")
    for number, row in enumerate(value, start=1):
        yield number, row if isinstance(row, dict) else f"a row must be a JSON object, got {str(row)[:60]!r}"


def _text_lines(path: Path) -> Iterator[tuple[int, str | bytes]]:
    """Lines with their numbers from 1, decoded one by one so that a bad byte names its line, which is given back
    as it is."""
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: line is longer than {MAX_LINE_BYTES // 2**20} MiB, the most allowed")
            if number == 1 and line.startswith(UTF16_BOMS):
                raise DataError(f"{path}:1: the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(UTF8_BOM) if number == 1 else line
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                yield number, line
                continue
            yield number, line if "\0" in text else text


def _undecodable(line: bytes) -> str:
    if b"\0" in line:
        return f"NUL byte at column {line.index(0) + 1}; the file is damaged or not text"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return f"not UTF-8: {got}; save the file as UTF-8"
    raise AssertionError("a line that can be decoded is text")


def _csv_rows(path: Path) -> Iterator[Row]:
    # The csv module allows fields of 128 KiB; its limit can only be raised for the whole process.
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = "\t" if ".tsv" in ending_of(path) else ","
    reader = csv.reader(_csv_lines(path), strict=True, delimiter=delimiter)
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
        elif record and len(record) != len(header):
            yield started, f"{len(record)} values, but the header has {len(header)} columns; quote commas in text"
        elif record:
            yield started, dict(zip(header, record, strict=True))
        started = reader.line_num + 1


def _csv_lines(path: Path) -> Iterator[str]:
    for number, text in _text_lines(path):
        if isinstance(text, bytes):
            raise DataError(f"{path}:{number}: {_undecodable(text)}")
        yield text


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from enumerate(arrow_rows(file.iter_batches(batch_size=1024)), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def arrow_rows(batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """The rows of Arrow record batches, with numbers of 16 and 32 bits as they were written: 1.1, not 1.10000002."""
    for batch in batches:
        narrow = dict(zip(batch.schema.names, batch.schema.types, strict=True))
        for values in batch.to_pylist():
            yield {name: _widened(value, narrow[name]) for name, value in values.items()}


def _widened(value: Any, kind: Any) -> Any:
    import numpy
    from pyarrow import types

    if value is None:
        return None
    if types.is_float32(kind) or types.is_float16(kind):
        shortest = numpy.float32(value) if types.is_float32(kind) else numpy.float16(value)
        return float(str(shortest))
    if types.is_struct(kind):
        inside = [kind.field(i) for i in range(kind.num_fields)]
        return {field.name: _widened(value[field.name], field.type) for field in inside}
    if types.is_list(kind) or types.is_large_list(kind):
        return [_widened(item, kind.value_type) for item in value]
    return value


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
