"""Datasets with every setting filled in, and their refusals; shared by the tests of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opsd_cli.data.datasets import Gsm8k, Hub, Jsonl
from opsd_cli.settings.errors import DataError

GSM8K_FOLDER = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K_FOLDER.is_dir(), reason="GSM8K's files are not beside the repository")


def gsm8k(**changes: Any) -> Gsm8k:
    values: dict[str, Any] = {"path": str(GSM8K_FOLDER), "revision": None, "instruction": ""}
    return Gsm8k(**{**values, "train_problems": None, "validation_problems": 200, **changes})


def jsonl(path: Path, **changes: Any) -> Jsonl:
    values: dict[str, Any] = {
        "path": str(path),
        "question_field": "question",
        "solution_field": "solution",
        "answer_field": "answer",
        "id_field": None,
        "max_bad_share": 0.0,
        "instruction": "",
        "train_problems": None,
        "validation_problems": None,
        "test_problems": None,
    }
    return Jsonl(**{**values, **changes})


def hub_dataset(**changes: Any) -> Hub:
    values: dict[str, Any] = {
        "path": "openai/gsm8k",
        "subset": "main",
        "revision": None,
        "train_split": "train",
        "validation_split": None,
        "test_split": "test",
        "question_field": "question",
        "solution_field": "answer",
        "answer_field": None,
        "id_field": None,
        "max_bad_share": 0.0,
        "instruction": "",
        "train_problems": None,
        "validation_problems": 1,
        "test_problems": None,
    }
    return Hub(**{**values, **changes})


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def message(dataset: Gsm8k | Jsonl | Hub) -> str:
    """The DataError of a load: one line."""
    with pytest.raises(DataError) as caught:
        dataset.load()
    assert "\n" not in str(caught.value)
    return str(caught.value)
