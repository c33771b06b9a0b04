"""The benchmarks of a card run here at small sizes: what they measure and what they write to a file."""

from __future__ import annotations

import json
import os
import re
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


def test_a_benchmark_takes_the_options_that_it_reads_and_refuses_the_others():
    """Those of measure.OPTIONS; what `start` and `report` read, all have."""
    parts = {"memory.py": ["memory_on_card.py"]}
    scripts = [path for path in BENCHMARKS.glob("*.py") if "= arguments(" in path.read_text()]
    assert len(scripts) == 13
    for script in scripts:
        text = "".join((BENCHMARKS / name).read_text() for name in (script.name, *parts.get(script.name, [])))
        takes = re.search(r"= arguments\(__doc__ or \"\"(?:, takes=\((.*?)\))?\)", text)
        read = set(re.findall(r"options\.(full|small|rounds|cpu_seconds)\b", text))
        assert read == set(re.findall(r"\w+", takes.group(1) or "")), script.name
        assert "report(options" in text, f"{script.name} has no --json"


@pytest.mark.slow
def test_the_benchmarks_of_a_card_measure_all_their_cases_and_write_them_to_a_file(tmp_path: Path):
    names = ("loss", "memory", "rollout", "token", "groups")
    losses, memory, rollouts, tokens, groups = (tmp_path / f"{name}.json" for name in names)
    runs = [
        [BENCHMARKS / "loss.py", *CARD, losses, "--divergence", "jsd", "--rounds", "1"],
        [BENCHMARKS / "memory.py", *CARD, memory, "--teachers", "2", "--weights", "lora"],
        [BENCHMARKS / "rollout.py", *CARD, rollouts],
        [BENCHMARKS / "decode_token.py", *CARD, tokens, "--only", "no graphs", "generate"],
        [BENCHMARKS / "groups.py", *CARD, groups, "--rounds", "1"],
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

    assert {row[0] for row in json.loads(rollouts.read_text())["rows"]} == {
        f"tiny, random, {what}" for what in ("equal", "long tail", "groups of 8")
    }
    for _, _, own, shared, *seconds in json.loads(groups.read_text())["rows"]:
        assert own > shared
        assert all(figure > 0 for figure in seconds)
    assert [row[2] for row in json.loads(tokens.read_text())["rows"]] == ["no graphs", "generate"]
    assert "medians of 1 round\n" in done.stdout

    ours = json.loads(done.stdout.splitlines()[-1])
    assert ours["completion"] > 1
    assert ours["step"] >= ours["sample"] + ours["score"] + ours["update"] > 0
