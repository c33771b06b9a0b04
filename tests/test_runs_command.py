"""`opsd runs`: the list of runs, its filters, and what differs between two."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from recipe_support import opsd
from run_support import make_run, make_sweep

pytestmark = pytest.mark.usefixtures("tmp_cwd")


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_run_has_a_line_also_those_of_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "good")
    make_run(Path("runs"), "died", outcome=None)
    make_sweep(Path("runs/sweep"), {"0_0.1": {}, "1_9": {"outcome": "failed", "message": "loss is nan"}})
    code, out, _ = opsd(capsys, "runs", "--sort", "name")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert list(lines) == ["run", "died", "good", "sweep/0_0.1", "sweep/1_9"]
    assert "25.0 % -> 75.0 %" in lines["good"]
    assert "+20 -0" in lines["good"]
    assert "20/20" in lines["good"]
    assert "lost" in lines["died"]
    assert "failed" in lines["sweep/1_9"]
    assert "completed" in lines["sweep/0_0.1"]


def test_runs_are_filtered_and_sorted(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "a", right=(10, 30))
    make_run(Path("runs"), "b", right=(10, 12))
    make_run(Path("runs"), "c", outcome="stopped")
    _, out, _ = opsd(capsys, "runs", "--state", "completed", "--sort", "accuracy")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["b", "a"]
    assert "(may be noise)" in out.splitlines()[1]
    assert "(may be noise)" not in out.splitlines()[2]
    _, out, _ = opsd(capsys, "runs", "--method", "sft")
    assert out == "no run in runs with method=sft\n"
    _, out, _ = opsd(capsys, "runs", "--json", "--recipe", "quickstart", "--state", "stopped")
    (found,) = json.loads(out)
    assert (found["run"], found["state"], found["summary"]["steps"]) == ("c", "stopped", 20)


def test_a_damaged_folder_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "good")
    broken = make_run(Path("runs"), "broken")
    broken.config.write_text("a: !!python/object:os.system x\n", encoding="utf-8")
    torn = make_run(Path("runs"), "torn")
    torn.events.write_bytes(b'{"kind": "step"\n\xff\xfe\nnull\n[1]\n' + torn.events.read_bytes() + b'{"kind": "st')
    torn.summary.write_text('{"steps": 20, "after": "very good"}', encoding="utf-8")
    code, out, _ = opsd(capsys, "runs", "--sort", "name")
    assert code == 0
    assert "broken: runs/broken/config.yaml cannot be read" in out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["good", "torn"]
    assert "25.0 % -> 75.0 %" in out.splitlines()[2]


def test_a_strangers_record_of_commands_does_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    for name, record in (("a", {"argv": 3, "earlier": [7, {"argv": {}}]}), ("b", {"argv": ["opsd", "train", "x=a b"]})):
        make_run(Path("runs"), name).command.write_text(json.dumps(record), encoding="utf-8")
    assert opsd(capsys, "runs")[0] == 0
    assert opsd(capsys, "report", "a")[0] == 0
    assert "opsd train 'x=a b'" in opsd(capsys, "report", "b")[1]


def test_the_difference_of_two_runs_is_settings_results_and_a_paired_test(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "a", right=(10, 12), changes={"optim.lr": 0.1})
    make_run(Path("runs"), "b", right=(10, 30), changes={"optim.lr": 0.2})
    code, out, _ = opsd(capsys, "runs", "diff", "a", "runs/b")
    assert code == 0
    assert out.splitlines()[1].split() == ["optim.lr", "0.1", "0.2"]
    assert "run.name" not in out
    assert "model.path" not in out
    assert "b against a, the same 40 problems: 18 problems won, 0 lost: more than noise" in out
    _, out, _ = opsd(capsys, "runs", "diff", "a", "b", "--json")
    assert json.loads(out)["paired"]["won"] == 18


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs", "nowhere"), "nowhere: no such folder"),
        (("runs", "diff", "a"), "name two runs: opsd runs diff runs/A runs/B"),
        (("runs", "diff", "a", "c"), "c: no run and no sweep"),
        (("runs", "diff", "a", "runs/a"), "are the same run"),
        (("runs", "diff", "a", "runs/b", "--state", "failed"), "opsd runs diff takes no --state"),
        (("report", "a", "--csv", "--json"), "--csv and --json: one of them at a time"),
        (("report", "a", "--project", "x"), "add --to TRACKER"),
        (("report", "a" * 300), "... is no path: it has 300 bytes"),
        (("runs", "a" * 300), "... is no path: it has 300 bytes"),
        (("runs", "diff", "a", "a" * 300), "... is no path: it has 300 bytes"),
        (("recipes", "copy", "quickstart", "a" * 300), "... is no path: it has 300 bytes"),
        (("runs", "--state", "done"), "invalid choice: 'done'"),
    ],
)
def test_what_is_no_run_is_told_in_a_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("runs"), "a")
    code, _, err = opsd(capsys, *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_that_may_not_be_read_is_a_line_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "a")
    opsd(capsys, "runs")  # whatever it imports is imported
    is_root = os.geteuid() == 0
    Path("runs").chmod(0)
    if is_root:
        os.seteuid(65534)
    try:
        code, _, err = opsd(capsys, "runs")
    finally:
        if is_root:
            os.seteuid(0)
        Path("runs").chmod(0o700)
    assert code == 3
    assert "Permission denied" in err
    assert "; ask for the permission, or choose another place" in err
