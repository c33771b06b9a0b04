"""`opsd watch` over several runs: members that wait, run, fail and are done, at every width, live and in a pipe."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.cells import cell_len
from run_support import STARTED, make_run, make_sweep
from test_ui import HOSTILE, on_a_terminal

from opsd_cli.commands import watch
from opsd_cli.insight.history import find_runs
from opsd_cli.run.events import EVENTS, EventLog
from opsd_cli.run.folder import RunFolder, write_config
from opsd_cli.run.lock import run_lock
from opsd_cli.settings.errors import ConfigError
from opsd_cli.ui.fleet import Fleet, FleetScreen

WHY = "out of memory; lower train.micro_batch_tokens"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two members are done, one has failed, one has lost its process, one left no folder."""
    members = {
        "0_a": {}, "1_b": {"outcome": "failed", "message": WHY}, "2_c": {"outcome": None}, "3_d": None,
        "4_e": {"right": (10, 12)},
    }  # fmt: skip
    return make_sweep(tmp_path / "sw", members)


def fleet_of(sweep: Path) -> Fleet:
    fleet = Fleet(lambda: list(find_runs(sweep)), title=sweep.name, sweep=sweep)
    fleet.look()
    return fleet


def begin_member(sweep: Path, name: str, *, steps: int) -> RunFolder:
    folder = RunFolder(sweep / name)
    folder.path.mkdir()
    write_config(folder, {"eval": {"every": 0}})
    log = EventLog(folder.events)
    log.write("run_started", **{**STARTED, "run": name, "steps": 20})
    for step in range(1, steps + 1):
        log.write("step", step=step, metrics={"loss/objective": 1 / step, "time/step": 2.0})
    log.close()
    return folder


def run_watch(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    code = "import sys; from opsd_cli.cli import main; raise SystemExit(main(['watch', *sys.argv[1:]]))"
    env = {**os.environ, **environ}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_every_member_has_a_row_with_its_state(sweep):
    fleet = fleet_of(sweep)
    assert fleet.states() == {"0_a": "done", "1_b": "failed", "2_c": "failed", "4_e": "done", "3_d": "failed"}
    rows = {row["run"]: row for row in fleet.rows(unicode=True)}
    assert rows["0_a"]["step"] == "20/20"
    assert rows["0_a"]["accuracy"] == "25.0 % → 75.0 %"
    assert rows["0_a"]["loss"] == "0.0500"
    assert rows["1_b"]["warnings"] == "1"
    assert fleet.is_over
    assert fleet.waiting == 0
    assert list(fleet.failures()) == [("1_b", WHY)]
    assert fleet.summary() == "sw: 5 runs, 2 done, 3 failed"


def test_members_that_run_are_followed_and_those_to_come_are_counted(sweep):
    (sweep / "sweep.json").write_text(json.dumps({"words": [], "members": 9}))
    with ExitStack() as stack:
        stack.enter_context(run_lock(RunFolder(sweep)))
        fleet = fleet_of(sweep)
        assert not fleet.is_over
        assert fleet.waiting == 4
        folder = begin_member(sweep, "5_f", steps=3)
        running = stack.enter_context(ExitStack())
        running.enter_context(run_lock(folder))
        fleet.look()
        assert fleet.states()["5_f"] == "running"
        row = fleet.rows(unicode=False)[-2]
        assert (row["run"], row["step"], row["curve"]) == ("5_f", "3/20", "")
        assert row["left"] == "34 s"
        assert "1 running" in fleet.summary()
        assert "3 waiting" in fleet.summary()
        log = EventLog(folder.events)
        log.write("run_ended", outcome="stopped", step=3, exit_code=143, message="")
        log.close()
        fleet.look()  # its last event is there and its process not gone yet
        running.close()
        fleet.look()
        assert fleet.states()["5_f"] == "stopped"
        assert not fleet.is_over
    fleet.look()
    assert not fleet.is_over, "for a moment more members may come"
    fleet._alive_at = time.monotonic() - 60
    assert fleet.is_over


def test_the_table_fits_every_terminal(sweep):
    for number in range(30):
        (sweep / f"9_{number}-{'x' * 50}").mkdir()
        shutil.copy(sweep / "0_a" / "config.yaml", sweep / f"9_{number}-{'x' * 50}")
        shutil.copy(sweep / "0_a" / "events.jsonl", sweep / f"9_{number}-{'x' * 50}")
    make_run(sweep, "9_y", steps=2, outcome="failed", message=HOSTILE)
    screen = FleetScreen(fleet_of(sweep))
    for (width, height), unicode in itertools.product([(120, 40), (80, 24), (40, 24), (20, 5)], [True, False]):
        lines = [line.plain for line in screen.lines(width, height, unicode)]
        assert len(lines) <= height
        assert max(map(cell_len, lines)) <= width
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", "\n".join(lines))
        if height == 24:
            assert lines[2].split()[:3] == ["run", "state", "step"]
            assert "failed" in lines[3], "what failed comes first where not all have room"
            assert any(re.match(r"and \d+ more", line) for line in lines)


def test_in_a_pipe_a_change_is_one_line_and_the_table_goes_to_stdout(sweep):
    done = run_watch(str(sweep), cwd=sweep.parent)
    assert done.returncode == 0
    table = done.stdout.splitlines()
    assert table[0].split() == ["run", "state", "step", "loss", "curve", "accuracy", "left", "warnings"]
    assert len(table) == 6
    assert all(re.match(r"\S+ member run=\S+ state=", line) for line in done.stderr.splitlines()[:5])
    assert done.stderr.splitlines()[5:] == [f"1_b: {WHY}"]
    assert "\x1b" not in done.stdout + done.stderr


def test_on_a_terminal_the_table_is_drawn_and_the_cursor_comes_back(sweep):
    received = on_a_terminal(RunFolder(sweep), 80)
    assert "\x1b[?25l" in received
    assert "\x1b[?25h" in received
    assert "sw: 5 runs, 2 done, 3 failed" in re.sub(r"\x1b\[[0-9;]*m", "", received)


def test_runs_and_sweeps_are_named_as_they_are_typed(sweep, tmp_path):
    make_run(tmp_path / "runs", "one", steps=2)
    done = run_watch("one", str(sweep), cwd=tmp_path)
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert names == ["one", "sw/0_a", "sw/1_b", "sw/2_c", "sw/4_e"]
    single = run_watch("one", cwd=tmp_path)
    assert single.stdout.startswith("trained    2 steps")
    wrong = run_watch("onne", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'one'" in wrong.stderr


def test_runs_of_one_name_in_two_folders_have_a_row_each(tmp_path):
    for folder in ("a", "b"):
        make_run(tmp_path / folder, "one", steps=2)
    done = run_watch("a/one", "b/one", cwd=tmp_path)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["a/one", "b/one"]


def test_without_a_name_it_follows_what_is_running(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"nothing is running under \./runs"):
        watch.main([])
    one = make_run(tmp_path / "runs", "one", steps=2)
    make_run(tmp_path / "runs", "two", steps=2)
    sweep.rename(tmp_path / "runs" / "sw")
    with run_lock(one):
        assert watch._running() == [one.path]
        (tmp_path / "runs" / "sw" / "members.jsonl").unlink()  # no member has ended yet
        with run_lock(RunFolder(tmp_path / "runs" / "sw" / "0_a")):
            assert watch._running() == [one.path, tmp_path / "runs" / "sw"]


def test_hostile_text_of_any_size_shows_literally_and_at_once(tmp_path):
    """Escape codes, markup, right-to-left, emoji and lines of ten megabytes, in events and in samples."""
    folder = make_run(
        tmp_path, "evil", steps=2, text=f"{HOSTILE} \u05e9\u05dc\u05d5\u05dd \U0001f600 </script>", outcome=None
    )
    huge, long = ("\x1b[2J[/INST]" + "x" * length for length in (10_000_000, 300_000))
    log = EventLog(folder.events)
    log.write("warning", message=huge)
    log.write("progress", phase=long, done=1, total=2)
    facts = dict.fromkeys(EVENTS["run_started"], 0) | {"device": long, "run": long, "steps": 10**400, "plan": [long]}
    log.write("run_started", **facts | {"task": "train"})
    metrics = {"loss/objective": long, "kl/forward": 1e308, HOSTILE: 1.0}
    log.append({"kind": "step", "time": 2e9, "step": 10**300, "metrics": metrics})
    log.write("run_ended", outcome="failed", step=1, exit_code=3, message=long)
    log.close()
    with open(folder.samples, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 9, "completion": huge}) + "\n")
    begin = time.monotonic()
    piped, received = run_watch(str(folder.path), cwd=tmp_path), on_a_terminal(folder, 80)
    table = run_watch(str(folder.path), str(tmp_path), cwd=tmp_path)
    assert time.monotonic() - begin < 30
    for text in (piped.stdout + piped.stderr, table.stdout + table.stderr, received):
        assert "Traceback" not in text
        assert len(text) < 100_000
        assert "\x1b[2J" not in text
        assert "\x1b[31mred" not in text
        assert "\u202e" not in text
        assert r"\x1b[2J[/INST]" in text
