"""Datasets that exist already, as plug-ins: GSM8K, your own files, any dataset on the hub. Which rows form which split.

THE ONLY file that uses the `datasets` library: it reads the hub's newest copy, or the cached one when the hub cannot be
reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field

from opsd_cli.data.hub import explain_hub_failure, hub_errors, look_up
from opsd_cli.data.problems import Problem, Splits
from opsd_cli.data.rows import READERS, FieldMap, Table, fingerprint, first_line, problems_of, read_table
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.registry import plugin

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]

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
        if self.path is None:
            splits: dict[str, str | None] = {"train": "train", "test": "test"}
            tables, source = read_hub(GSM8K_HUB, splits, GSM8K_FIELDS, subset="main", revision=self.revision)
        else:
            folder, tables, source = Path(self.path), {}, f"GSM8K in {self.path}"
            for split in ("train", "test"):
                if not (folder / f"{split}.jsonl").is_file():
                    raise DataError(
                        f"dataset.path={folder}: no file {split}.jsonl there; give a folder with GSM8K's train.jsonl "
                        "and test.jsonl, or dataset.path=null to load openai/gsm8k from the hub"
                    )
                tables[split] = read_table(folder / f"{split}.jsonl", GSM8K_FIELDS.columns)
        problems = {split: problems_of(table, GSM8K_FIELDS, split=split) for split, table in tables.items()}
        counts = {"train": self.train_problems, "validation": self.validation_problems, "test": None}
        return split_up(problems, counts, source=source)


@plugin("dataset", "jsonl")
class Jsonl:
    """Your own rows: one file, or a folder with train, validation and test files (.jsonl, .csv or .parquet)."""

    path: str  # one file (all train) or a folder with train.* and, if there are, validation.* and test.*
    question_field: str  # column of the question
    solution_field: str  # column of the reference solution, shown to the teacher only
    answer_field: str | None  # column of the final answer; None: found in the solution (#### or \boxed{})
    id_field: str | None  # column of a unique id; None: row number
    instruction: str  # sentence after the question, shown to both roles
    train_problems: Positive | None  # the first so many; None: all
    validation_problems: NonNegative | None  # first of the file (None: all); no file: from the end of train
    test_problems: NonNegative | None  # first of the file (None: all); no file: end of train (None: a tenth, <= 256)

    def load(self) -> Splits:
        """Read the splits. Raises DataError that names file, line and column."""
        fields = FieldMap(self.question_field, self.solution_field, self.answer_field, self.id_field)
        files = _split_files(Path(self.path))
        problems = {s: problems_of(read_table(file, fields.columns), fields, split=s) for s, file in files.items()}
        counts = {"train": self.train_problems, "validation": self.validation_problems, "test": self.test_problems}
        return split_up(problems, counts, source=self.path)


def _split_files(path: Path) -> dict[str, Path]:
    """The file of each split that `path` has."""
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise DataError(f"dataset.path={path}: no such file or folder")
    files: dict[str, Path] = {}
    for split in SPLIT_NAMES:
        present = [path / f"{split}{ending}" for ending in READERS if (path / f"{split}{ending}").is_file()]
        if len(present) > 1:
            names = " and ".join(file.name for file in present)
            raise DataError(f"dataset.path={path}: {names} are both there; keep one")
        if present:
            files[split] = present[0]
    if "train" not in files:
        raise DataError(f"dataset.path={path}: no train file there (train{', train'.join(READERS)})")
    return files


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
    solution_field: str  # column of the reference solution, shown to the teacher only
    answer_field: str | None  # column of the final answer; None: found in the solution (#### or \boxed{})
    id_field: str | None  # column of a unique id; None: row number
    instruction: str  # sentence after the question, shown to both roles
    train_problems: Positive | None  # the first so many; None: all
    validation_problems: NonNegative | None  # first of the split (None: all); no split: from the end of train
    test_problems: NonNegative | None  # first of the split (None: all); no split: end of train (None: a tenth, <= 256)

    def load(self) -> Splits:
        """Read the splits. Raises DataError for bad rows or names, OutsideError without hub and cached copy."""
        fields = FieldMap(self.question_field, self.solution_field, self.answer_field, self.id_field)
        wanted = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        tables, source = read_hub(self.path, wanted, fields, subset=self.subset, revision=self.revision)
        problems = {split: problems_of(table, fields, split=split) for split, table in tables.items()}
        counts = {"train": self.train_problems, "validation": self.validation_problems, "test": self.test_problems}
        return split_up(problems, counts, source=source)


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
    kept = loaded.select_columns([column for column in fields.columns if column in loaded.column_names])
    rows = tuple((number, dict(row)) for number, row in enumerate(kept, start=1))
    return Table(f"{what} ({split})", tuple(loaded.column_names), rows)


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


def split_up(problems: dict[str, tuple[Problem, ...]], counts: dict[str, int | None], *, source: str) -> Splits:
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
    return Splits(kept, taken["validation"], taken["test"], source=origin, fingerprint=digest)
