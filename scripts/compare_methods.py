"""The methods side by side on the quickstart: what each learns of the training problems' words, what it forgets of a
skill that training never shows, and what it costs. One sweep and one table.

    python scripts/compare_methods.py                        # 3 seeds
    python scripts/compare_methods.py --seeds 0 train.steps=20

Other arguments are overrides of every run. The recipe's numbers were chosen on the validation split
(docs/quickstart.md); the table is about the test split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

METHODS = {
    "opsd": "on-policy self-distillation",
    "op2sd": "control: another problem's reference",
    "no_reference": "control: no reference",
    "sft": "fine-tuning on the references",
    "off_policy": "distillation along the references",
    "opd": "distillation from another model",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--root", type=Path, default=Path("runs") / time.strftime("compare_%Y-%m-%d_%H-%M-%S"))
    arguments, overrides = parser.parse_known_args()
    sweep(arguments.root, [f"method={','.join(METHODS)}", f"run.seed={arguments.seeds}", *overrides])
    print_table(arguments.root)


def sweep(folder: Path, words: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "opsd_cli",
        "train",
        "-m",
        "recipe=quickstart",
        f"hydra.sweep.dir={folder}",
        *words,
    ]
    subprocess.run(command, check=True)


def runs_in(folder: Path) -> list[tuple[Path, list[str]]]:
    """Every member of a sweep and what set it apart."""
    lines = (folder / "members.jsonl").read_text().splitlines()
    return [(folder / item["name"], item["swept"]) for item in map(json.loads, lines)]


def print_table(root: Path) -> None:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for folder, swept in runs_in(root):
        (method,) = (word.partition("=")[2] for word in swept if word.startswith("method="))
        found[method].append(json.loads((folder / "summary.json").read_text()))
    heads = ("method", "accuracy before -> after", "teacher after", "retention", "tokens", "seconds")
    print("\n" + "{:14}{:>26}{:>15}{:>20}{:>9}{:>9}".format(*heads))
    for method, description in METHODS.items():
        rows = found[method]
        after, retained = spread(rows, "after"), spread(rows, "retention_after")
        print(
            f"{method:14}{mean(rows, 'before'):>8.1f} -> {after:<14}{mean(rows, 'teacher_after'):>15.1f}"
            f"{mean(rows, 'retention_before'):>8.1f} -> {retained:<10}"
            f"{statistics.mean(row['completion_tokens'] for row in rows):>7.0f}"
            f"{statistics.mean(row['training_seconds'] for row in rows):>9.0f}   {description}"
        )
    print(f"per cent on the test split: mean and range over {len(found['opsd'])} seeds; every run is in {root}")


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return 100 * statistics.mean(row[key]["accuracy"] for row in rows)


def spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [100 * row[key]["accuracy"] for row in rows]
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
