"""The command that proves a card: it runs on a CPU at small sizes, its checks are tests where there is a card, and a
check that raises or hangs is a failed line among others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPOSITORY, TESTS

sys.path.insert(0, str(REPOSITORY / "scripts"))
from gpu_checks import GROUPS, Group
from gpu_checks.check import Bench, Row
from gpu_checks.child import planned
from gpu_checks.lane import Lane, has_card

SCRIPT = REPOSITORY / "scripts" / "gpu_check.py"
FILES = {group.name: group.file for group in GROUPS}


SAMPLE = (
    "methods/teacher ema", "decoding/lean fp32, head size 32", "decoding/module fp32, head size 32",
    "graphs/after updates of ZeRO-3", "graphs/captured", "loss", "gradients/fp32", "layout", "drawing",
    "memory/recovers, fp32", "process", "speed", "stages/stage 3", "tokens",
)  # fmt: skip
"""What a CPU is asked to show here: each way of checking once."""


def names(device: str) -> list[str]:
    plan = planned(FILES, Bench(torch.device(device), Path()), list(FILES))
    return [f"{group}/{check.name}" for group, check in plan]


def command(*words: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **more}


def report(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    file = folder / "found.json"
    done = subprocess.run(
        command(*words, "--json", file), env=environment(), capture_output=True, text=True, timeout=590, check=False
    )
    return done, json.loads(file.read_text())


@pytest.mark.timeout(600)  # under a minute on two cores of one's own
@pytest.mark.slow
def test_the_command_runs_on_a_cpu_and_skips_by_name_what_needs_a_card(tmp_path: Path):
    done, found = report(tmp_path, "--device", "cpu", "--only", *SAMPLE)
    rows = {f"{row['group']}/{row['name']}": row for row in found["checks"]}
    failed = {name: (row["figures"], row["note"]) for name, row in rows.items() if row["verdict"] == "fail"}
    assert not failed
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(rows) == sorted(name for name in names("cpu") if name.startswith(SAMPLE))
    assert "skip  loss/triton fp32, V=499" in done.stdout
    for group in FILES.keys() - {"quickstart", "runs", "tokens"}:  # minutes on a CPU, and what a CPU has none of
        assert any(row["verdict"] != "skip" for row in rows.values() if row["group"] == group), group
    assert all(row["note"] for row in rows.values() if row["verdict"] == "skip")
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"].keys() >= {"device", "cuda", "transformers", "deepspeed", "triton"}


@cache
def on_the_card(group: str, folder: Path) -> dict[str, Row]:
    _, found = report(folder, "--device", "cuda", "--only", group)
    return {f"{row['group']}/{row['name']}": row for row in found["checks"]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("card")


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not has_card(os.environ), reason="no NVIDIA card is visible")
@pytest.mark.parametrize("name", names("cuda"))
def test_a_check_holds_on_the_card(name: str, folder: Path):
    row = on_the_card(name.partition("/")[0], folder)[name]
    assert row["verdict"] != "fail", (row["figures"], row["note"])


@pytest.mark.slow
def test_a_check_that_raises_or_hangs_is_a_failed_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(TESTS)]))
    groups = [Group("first", "", 6, module="planted_checks"), Group("second", "", 60, module="planted_checks")]
    lane = Lane(groups, "cpu", ["first", "second/passes"], tmp_path)
    lane.start()
    rows: list[Row] = []
    try:
        while not lane.is_over:
            rows += lane.poll()
            time.sleep(0.05)
    finally:
        lane.kill()
    assert [(row.full_name, row.verdict) for row in rows] == [
        ("first/passes", "pass"), ("first/is off", "fail"), ("first/raises", "fail"), ("first/for a card", "skip"),
        ("first/hangs", "fail"), ("first/behind it", "fail"), ("second/passes", "pass"),
    ]  # fmt: skip
    notes = {row.name: row.note for row in rows if row.group == "first"}
    assert notes["raises"] == "ended with exit code 1: RuntimeError: CUDA error: misaligned address"
    assert notes["hangs"] == "still at work when the 6 s of its group were over"
    assert notes["behind it"].startswith("not reached")
    assert str(rows[0]).split() == [
        "pass", "first/passes", f"{rows[0].seconds:.2f}", "s", "error", "1e-07", "<=", "0.001;", "share", "0.95", ">=",
        "0.9",
    ]  # fmt: skip


@pytest.mark.slow
def test_an_interrupt_ends_every_process_that_was_started(tmp_path: Path):
    runner = subprocess.Popen(
        command("--device", "cpu", "--only", "runs"), env=environment(TMPDIR=str(tmp_path)), stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip

    def at_work(word: str) -> list[int]:
        """Processes whose command line or environment names this test's folder."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(tmp_path).encode() in text and word.encode() in text:
                found.append(int(entry.name))
        return found

    deadline = time.monotonic() + 120
    try:
        while not at_work("opsd_cli.rank") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert at_work("opsd_cli.rank"), "no run was started"
        runner.send_signal(signal.SIGINT)
        output, _ = runner.communicate(timeout=30)
        assert runner.returncode == 130
        assert output.splitlines()[-1] == "stopped"
        while at_work("") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not at_work("")
    finally:
        runner.kill()
