"""`evaluations/`: a file of completions for each evaluation, and the problems whose grade has changed since the first,
with both completions."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opsd_cli.run.events import json_line
from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.errors import OutsideError

Answers = dict[str, dict[str, Any]]
"""Problem id -> its line in a file of completions."""

NAME = re.compile(r"step_(?P<step>\d+)_(?P<split>[a-z]+)_(?P<role>[a-z]+)\.jsonl")


def completions_file(folder: RunFolder, *, step: int, split: str, role: str) -> Path:
    return folder.evaluations / f"step_{step:06d}_{split}_{role}.jsonl"


def changes_file(folder: RunFolder, *, split: str) -> Path:
    return folder.evaluations / f"changed_{split}.jsonl"


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by these lines, all at once. Raises OutsideError if the disk is full."""
    new = Path(f"{path}.new")
    try:
        path.parent.mkdir(exist_ok=True)
        new.write_bytes(b"".join(map(json_line, lines)))
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OutsideError(f"cannot write {path}: {error.strerror}; free disk space, then resume") from None


def unfinished_file(folder: RunFolder, *, split: str, role: str) -> Path:
    """What a measurement that has not ended has so far."""
    return folder.evaluations / f"unfinished_{split}_{role}.jsonl"


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file. Raises OutsideError if the disk is full."""
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.write(b"".join(map(json_line, lines)))
    except OSError as error:
        raise OutsideError(f"cannot write {path}: {error.strerror}; free disk space, then resume") from None


def read_outcomes(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of completions, each with `correct`; none where it is absent. Others are skipped: the last
    one may be cut short."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                item = json.loads(line)
                if isinstance(item, dict) and isinstance(item.get("correct"), bool):
                    found.append(item)
    return found


def read_completions(path: Path) -> Answers:
    """The first completion of each problem of a file of completions, with `share`, how many of the problem's are right,
    from 0 to 1."""
    found: Answers = {}
    right: dict[str, list[bool]] = {}
    for item in read_outcomes(path):
        problem = str(item.get("problem"))
        found.setdefault(problem, item)
        right.setdefault(problem, []).append(item["correct"])
    return {problem: item | {"share": sum(right[problem]) / len(right[problem])} for problem, item in found.items()}


def first_evaluated_step(folder: RunFolder, *, split: str, role: str) -> int | None:
    """The earliest step whose completions are kept."""
    names = (NAME.fullmatch(path.name) for path in folder.evaluations.glob("step_*.jsonl"))
    return min((int(m["step"]) for m in names if m and (m["split"], m["role"]) == (split, role)), default=None)


def changed_lines(
    first: Answers, last: Answers, *, won: Iterable[str], lost: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """The problems whose grade changed, those that were lost first, with what was answered before and after."""
    for change, problems in (("lost", lost), ("won", won)):
        for problem in problems:
            before, after = first[problem], last[problem]
            yield {
                "change": change,
                **{key: after.get(key) for key in ("problem", "question", "answer")},
                "before": before.get("completion"),
                "after": after.get("completion"),
            }


def read_changes(folder: RunFolder, *, split: str) -> list[dict[str, Any]]:
    """The lines of `changed_SPLIT.jsonl`; none where it is absent. Others are skipped."""
    found = []
    with contextlib.suppress(OSError):
        for line in changes_file(folder, split=split).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                item = json.loads(line)
                if isinstance(item, dict) and item.get("change") in ("won", "lost"):
                    found.append(item)
    return found
