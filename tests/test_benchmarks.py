"""The benchmarks of a card run here at small sizes: what they measure and what they write to a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

BENCHMARKS = REPOSITORY / "scripts" / "bench"
IN_ONE_PROCESS = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""
"""Importing what they need takes longer than all they do at these sizes."""
CARD = ["--gpu", "--small", "--threads", "1", "--json"]
WORK = {
    "problems": 4, "completion": 8, "steps": 2, "skip": 1, "lr": 1e-5, "micro_batch_tokens": 16384,
    "shape": {
        "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 1024, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.slow
def test_the_benchmarks_of_a_card_measure_all_their_cases_and_write_them_to_a_file(tmp_path: Path):
    losses, memory = tmp_path / "loss.json", tmp_path / "memory.json"
    runs = [
        [BENCHMARKS / "loss.py", *CARD, losses, "--divergence", "jsd", "--rounds", "1"],
        [BENCHMARKS / "memory.py", *CARD, memory, "--teachers", "2", "--weights", "lora"],
        [BENCHMARKS / "step_on_card.py", json.dumps(WORK)],
    ]
    asked = json.dumps([list(map(str, words)) for words in runs])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{BENCHMARKS}"}
    command = [sys.executable, "-c", IN_ONE_PROCESS, asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    by_case = {row[4]: row for row in json.loads(losses.read_text())["rows"]}
    assert by_case.keys() >= {"products", "ours", "ours, fp32 logits", "trl", "naive"}
    assert all(row[5] > 0 for row in by_case.values())

    found = json.loads(memory.read_text())
    assert "CPU" in found["machine"]
    cases = [(loss, opd, opsd) for _, _, loss, opd, _, opsd, _, _ in found["rows"]]
    assert cases == [(loss, "OPD, teacher 2x", "OPSD, initial") for loss in ("fused", "naive")]
    assert all(row[4] > 0 and row[6] > 0 for row in found["rows"])

    ours = json.loads(done.stdout.splitlines()[-1])
    assert ours["completion"] > 1
    assert ours["step"] >= ours["sample"] + ours["score"] + ours["update"] > 0
