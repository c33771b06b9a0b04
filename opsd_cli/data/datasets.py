"""Datasets that exist already, as plug-ins: GSM8K, your own files, any dataset on the hub. Which rows form which split.

THE ONLY file that uses the `datasets` library: it reads the hub's newest copy, or the cached one when the hub cannot be
reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from opsd_cli.data.cells import column_of
from opsd_cli.data.files import Table, arrow_rows, first_line, is_saved, read_table, split_files
from opsd_cli.data.hub import explain_hub_failure, hub_errors, look_up
from opsd_cli.data.problems import Problem, Splits
from opsd_cli.data.rows import FieldMap, fingerprint, problems_of
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.registry import plugin

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

GSM8K_HUB = "openai/gsm8k"
GSM8K_FIELDS = FieldMap(question="question", solution="answer")
MAX_DEFAULT_TEST_PROBLEMS = 256  # held out as test where no number is given
SPLIT_NAMES = ("train", "validation", "test")


@plugin("dataset", "gsm8k")
class Gsm8k:
    """GSM8K: grade-school word problems. The solution is the worked text as published, with its calculator notes
    (`<<48/2=24>>`) and last line `#### 72`; the answer is that last number. Validation is the end of train."""

    path: str | None  # folder with train.jsonl and test.jsonl; None: openai/gsm8k from the hub
    revision: str | None  # commit, tag or branch on the hub; None: the newest
    instruction: str  # sentence after the question, shown to both roles
    train_problems: Positive | None  # the first so many; None: all
    validation_problems: NonNegative  # taken from the end of train

    def load(self) -> Splits:
        """Read the splits. Raises DataError for bad rows or a bad folder, OutsideError when the hub fails."""
        return self.load_showing(())

    def load_showing(self, columns: tuple[str, ...]) -> Splits:
        """The same, with these columns in `Problem.columns`."""
        fields = replace(GSM8K_FIELDS, shown=columns)
        if self.path is None:
            splits: dict[str, str | None] = {"train": "train", "test": "test"}
            tables, source = read_hub(GSM8K_HUB, splits, fields, subset="main", revision=self.revision)
        else:
            folder, tables, source = Path(self.path), {}, f"GSM8K in {self.path}"
            for split in ("train", "test"):
                if not (folder / f"{split}.jsonl").is_file():
                    raise DataError(
                        f"dataset.path={folder}: no file {split}.jsonl there; give a folder with GSM8K's train.jsonl "
                        "and test.jsonl, or dataset.path=null to load openai/gsm8k from the hub"
                    )
                tables[split] = read_table(folder / f"{split}.jsonl", fields.columns)
        counts = {"train": self.train_problems, "validation": self.validation_problems, "test": None}
        return split_up(tables, fields, counts, source=source)


@plugin("dataset", "jsonl")
class Jsonl:
    """Your own rows: a file, a folder with train, validation and test files or shards of them, a glob, or what
    `Dataset.save_to_disk` left. JSONL, JSON, CSV and Parquet, also compressed."""

    path: str  # one file (all train), a folder or a glob with train* and, if there are, validation* and test*
    question_field: str  # column of the question
    solution_field: str | None  # column of the reference solution, shown to the teacher only; None: there is none
    answer_field: str | None  # column of the final answer; None: found in the solution (#### or \boxed{})
    id_field: str | None  # column of a unique id; None: row number
    max_bad_share: Share  # of a split's rows, which may be left out because they cannot be used
    instruction: str  # sentence after the question, shown to both roles
    train_problems: Positive | None  # the first so many; None: all
    validation_problems: NonNegative | None  # first of the file (None: all); no file: from the end of train
    test_problems: NonNegative | None  # first of the file (None: all); no file: end of train (None: a tenth, <= 256)

    def load(self) -> Splits:
        """Read the splits. Raises DataError that names file, line and column."""
        return self.load_showing(())

    def load_showing(self, columns: tuple[str, ...]) -> Splits:
        """The same, with these columns in `Problem.columns`."""
        fields = FieldMap(self.question_field, self.solution_field, self.answer_field, self.id_field, columns)
        folder = Path(self.path)
        if folder.is_dir() and is_saved(folder):
            tables = _saved_tables(folder, fields)
        else:
            tables = {split: read_table(files, fields.columns) for split, files in split_files(self.path).items()}
        counts = {"train": self.train_problems, "validation": self.validation_problems, "test": self.test_problems}
        return split_up(tables, fields, counts, source=self.path, bad_share=self.max_bad_share)


@plugin("dataset", "hub")
class Hub:
    """Any dataset on the Hugging Face hub, by id, with a field map."""

    path: str  # dataset id, for example openai/gsm8k
    subset: str | None  # the dataset's configuration name; None: its only or default one
    revision: str | None  # commit, tag or branch; None: the newest
    train_split: str  # name of the hub split to train on
    validation_split: str | None  # hub split; None: taken from the end of train
    test_split: str | None  # hub split; None: taken from the end of train
    question_field: str  # column of the question
    solution_field: str | None  # column of the reference solution, shown to the teacher only; None: there is none
    answer_field: str | None  # column of the final answer; None: found in the solution (#### or \boxed{})
    id_field: str | None  # column of a unique id; None: row number
    max_bad_share: Share  # of a split's rows, which may be left out because they cannot be used
    instruction: str  # sentence after the question, shown to both roles
    train_problems: Positive | None  # the first so many; None: all
    validation_problems: NonNegative | None  # first of the split (None: all); no split: from the end of train
    test_problems: NonNegative | None  # first of the split (None: all); no split: end of train (None: a tenth, <= 256)

    def load(self) -> Splits:
        """Read the splits. Raises DataError for bad rows or names, OutsideError without hub and cached copy."""
        return self.load_showing(())

    def load_showing(self, columns: tuple[str, ...]) -> Splits:
        """The same, with these columns in `Problem.columns`."""
        fields = FieldMap(self.question_field, self.solution_field, self.answer_field, self.id_field, columns)
        wanted = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        tables, source = read_hub(self.path, wanted, fields, subset=self.subset, revision=self.revision)
        counts = {"train": self.train_problems, "validation": self.validation_problems, "test": self.test_problems}
        return split_up(tables, fields, counts, source=source, bad_share=self.max_bad_share)


def read_hub(
    name: str, splits: dict[str, str | None], fields: FieldMap, *, subset: str | None, revision: str | None
) -> tuple[dict[str, Table], str]:
    """The rows of our splits, each from the hub's split of that name, and which copy they come from. Asks the hub
    first, visibly. Raises DataError (name, subset, split) or OutsideError (hub, no cached copy)."""
    commit = look_up("dataset", name, revision=revision)
    source = name if subset is None else f"{name} ({subset})"
    source += ", the cached copy (the hub was not reached)" if commit is None else f" at {commit[:12]} from the hub"
    with hub_errors(f"dataset {name}"), _cache_only(commit is None):
        tables = {
            split: _hub_table(name, hub_split, fields, subset=subset, revision=revision)
            for split, hub_split in splits.items()
            if hub_split is not None
        }
    return tables, source


def _hub_table(name: str, split: str, fields: FieldMap, *, subset: str | None, revision: str | None) -> Table:
    import datasets

    what = f"dataset {name}"
    try:
        loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        # For an unknown subset or split the library's first line lists the available ones.
        raise explain_hub_failure(error, what) or DataError(f"{what}: {first_line(error)}") from error
    return _table_of(loaded, fields, where=f"{what} ({split})")


def _table_of(loaded: Any, fields: FieldMap, *, where: str) -> Table:
    """The rows of a dataset of the library, only the columns that are used."""
    names = tuple(loaded.column_names)
    wanted = {column_of(name, names) for name in fields.columns}
    kept = loaded.select_columns([name for name in names if name in wanted])
    batches = (table for chunk in kept.with_format("arrow").iter(1024) for table in chunk.to_batches())
    rows = tuple((where, (number, values)) for number, values in enumerate(arrow_rows(batches), start=1))
    return Table(where, names, rows)


def _saved_tables(folder: Path, fields: FieldMap) -> dict[str, Table]:
    """The splits of a folder that `save_to_disk` left. Raises DataError."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"dataset.path={folder}: not a readable saved dataset: {first_line(error)}") from None
    parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if "train" not in parts:
        raise DataError(f"dataset.path={folder}: no split train; it has {', '.join(parts)}")
    return {name: _table_of(parts[name], fields, where=f"{folder} ({name})") for name in SPLIT_NAMES if name in parts}


@contextmanager
def _cache_only(wanted: bool) -> Iterator[None]:
    """Keep the client libraries off the network inside the block, if `wanted`. Left alone they retry for half a minute
    per file although `look_up` has just found that the hub cannot be reached."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if wanted:
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def split_up(
    tables: dict[str, Table], fields: FieldMap, counts: dict[str, int | None], *, source: str, bad_share: float = 0.0
) -> Splits:
    """The problems of each table, as three splits."""
    read = {split: problems_of(table, fields, split=split, bad_share=bad_share) for split, table in tables.items()}
    left_out = tuple(one.left_out for one in read.values() if one.left_out)
    return divide({split: one.problems for split, one in read.items()}, counts, source=source, left_out=left_out)


def divide(
    problems: dict[str, tuple[Problem, ...]],
    counts: dict[str, int | None],
    *,
    source: str,
    left_out: tuple[str, ...] = (),
) -> Splits:
    """The three splits. One that was not read is taken from the end of train: test first, then validation before it.
    A count of None means all of a split that was read; for one that was not read, a tenth of train as test (at most
    MAX_DEFAULT_TEST_PROBLEMS) and no validation."""
    rest, origin = problems["train"], source
    taken: dict[str, tuple[Problem, ...]] = {}
    for split in ("test", "validation"):
        count = counts[split]
        if split in problems:
            taken[split] = problems[split][:count]
            continue
        if count is None:
            count = min(MAX_DEFAULT_TEST_PROBLEMS, max(1, len(rest) // 10), len(rest) - 1) if split == "test" else 0
        if count >= len(rest):
            raise DataError(
                f"{source}: train has {len(rest)} problems left, {count} of them cannot become {split}; "
                f"lower dataset.{split}_problems"
            )
        taken[split], rest = rest[len(rest) - count :], rest[: len(rest) - count]
        origin += f", of it the last {count} as {split}" if count else ""
    kept = rest[: counts["train"]]
    digest = fingerprint(kept, taken["validation"], taken["test"])
    return Splits(kept, taken["validation"], taken["test"], source=origin, fingerprint=digest, left_out=left_out)
