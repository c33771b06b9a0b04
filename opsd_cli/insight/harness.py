"""Standard tasks by lm-evaluation-harness (the extra `harness`): run in a process of its own, read back from the files
that it writes, and compared item by item with the model before training."""

from __future__ import annotations

import glob
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_cli.insight.paired import Comparison, compare
from opsd_cli.settings.errors import DataError, OutsideError

LOG = "lm_eval.log"


@dataclass(frozen=True)
class Score:
    """A metric of a task, on one model."""

    task: str
    metric: str
    filter: str
    value: float
    error: float | None  # the harness's own standard error
    items: Mapping[str, float]  # of each item, by its number


def run_tasks(
    model: str, tasks: Sequence[str], folder: Path, *, device: str, options: Sequence[str] = ()
) -> list[Score]:
    """Have the harness measure a model (a folder or a hub id) on tasks, and write what it finds to `folder`; `options`
    are flags of its own. Raises OutsideError, with the end of what it said, where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", ",".join(tasks), "--device", device,
        "--output_path", str(folder), "--log_samples", *options,
    ]  # fmt: skip
    with (folder / LOG).open("w", encoding="utf-8") as log:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "lm_eval", *words], stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode != 0:
        last = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise OutsideError(
            f"lm-evaluation-harness failed (exit code {ended.returncode}): {' '.join(last)[:300]}; all it said is in "
            f"{folder / LOG}"
        )
    return list(read_scores(folder))


def read_scores(folder: Path) -> Iterator[Score]:
    """Every metric in the newest results that the harness has written. Raises DataError where there are none."""
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise DataError(f"{folder}: lm-evaluation-harness has written no results there")
    results: dict[str, dict[str, Any]] = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    for task, values in results.items():
        for name, value in values.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            yield Score(
                task, metric, kind, float(value), float(error) if isinstance(error, int | float) else None,
                _items(folder, task, metric, kind),
            )  # fmt: skip


def _items(folder: Path, task: str, metric: str, kind: str) -> dict[str, float]:
    """A metric of each item of a task; empty where the harness kept none."""
    # A time follows the name: `samples_gsm8k_*` alone would be those of gsm8k_cot too.
    files = sorted(folder.rglob(f"samples_{glob.escape(task)}_[0-9][0-9][0-9][0-9]-*.jsonl"))
    found: dict[str, float] = {}
    # Its lines may hold U+2028, which ends none, though `splitlines` takes it for an end.
    for line in files[-1].read_bytes().strip().split(b"\n") if files else ():
        item = json.loads(line)
        if item.get("filter", kind) == kind and isinstance(item.get(metric), int | float):
            found[str(item["doc_id"])] = float(item[metric])
    return found


def against(before: Sequence[Score], after: Sequence[Score]) -> Iterator[tuple[Score, Score, Comparison | None]]:
    """Each metric of both, with the paired comparison of its items where they are shares."""
    known = {(score.task, score.metric, score.filter): score for score in before}
    for score in after:
        first = known.get((score.task, score.metric, score.filter))
        if first is not None:
            shares = all(0 <= value <= 1 for items in (first.items, score.items) for value in items.values())
            yield first, score, compare(first.items, score.items) if shares else None
