"""The run folder: named, numbered, never overwritten, locked by one process, explained when it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from opsd_cli.run.events import EVENTS, EventLog
from opsd_cli.run.folder import (
    RunFolder,
    discard_unstarted,
    new_run_folder,
    open_run_folder,
    read_command,
    read_config,
    write_command,
    write_config,
)
from opsd_cli.run.lock import run_lock, running_process
from opsd_cli.run.rank_errors import RankError, clear_errors, first_error, write_crash, write_error
from opsd_cli.settings.errors import ConfigError, DataError, ExitCode, OutsideError
from opsd_cli.settings.resume_rules import changed_keys, later

HOLDER = """
import sys, pathlib
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.lock import run_lock
with run_lock(RunFolder(pathlib.Path(sys.argv[1]))):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder: RunFolder) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    return holder


def test_folders_without_a_name_are_numbered_from_the_hint(tmp_path):
    names = [new_run_folder(tmp_path, name=None, hint="quickstart-opsd-tiny").name for _ in range(3)]
    assert names == [f"quickstart-opsd-tiny-00{number}" for number in (1, 2, 3)]
    assert new_run_folder(tmp_path, name=None, hint="../e vil/ü").name == "e-vil-001"
    assert new_run_folder(tmp_path, name=None, hint="..").name == "run-001"


def test_two_runs_started_at_once_get_two_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_run_folder(tmp_path, name=None, hint="sweep").name, range(24)))
    assert len(set(made)) == 24


def test_a_name_that_is_taken_is_refused_and_nothing_is_touched(tmp_path):
    folder = new_run_folder(tmp_path, name="mine", hint="x")
    folder.summary.write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    with pytest.raises(ConfigError, match=r"mine exists .* --resume .*mine`, or give another run\.name"):
        new_run_folder(tmp_path, name="mine", hint="x")
    assert before == {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}


def test_a_file_in_the_way_is_an_outside_error_with_path_and_errno(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(OutsideError, match=r"/runs: .*\(errno 20\).*run\.root") as caught:
        new_run_folder(tmp_path / "runs", name=None, hint="x")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    with pytest.raises(OutsideError, match=r"errno 20"):
        new_run_folder(tmp_path / "runs" / "below", name=None, hint="x")


def test_a_folder_that_cannot_be_written_is_an_outside_error():
    with pytest.raises(OutsideError, match=r"cannot write /proc/.*errno"):
        new_run_folder("/proc/opsd-runs", name="a", hint="x")


def test_blanks_and_unicode_in_the_path_work(tmp_path):
    folder = new_run_folder(tmp_path / "mes expériences ✓", name="a", hint="x")
    write_config(folder, {"run": {"name": "ü ✓", "betas": (0.9, 0.95)}})
    assert read_config(folder)["run"] == {"name": "ü ✓", "betas": [0.9, 0.95]}
    assert f"opsd train --resume '{folder.path}'" in folder.config.read_text()
    assert open_run_folder(folder.path).path == folder.path


def test_a_run_is_found_by_path_and_by_name_and_a_near_miss_is_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = new_run_folder("runs", name="gsm8k-001", hint="x")
    write_config(folder, {})
    assert open_run_folder("runs/gsm8k-001").path == folder.path
    assert open_run_folder("gsm8k-001").path == folder.path
    with pytest.raises(ConfigError, match=r"did you mean 'gsm8k-001'"):
        open_run_folder("gsm8k-01")
    with pytest.raises(ConfigError, match=r"did you mean 'gsm8k-001'"):
        open_run_folder("runs/gsm8-001")


def test_a_broken_frozen_config_is_named(tmp_path):
    folder = new_run_folder(tmp_path, name="a", hint="x")
    for text in ("a: [", "just words", "", "a: !!python/object/apply:os.system ['true']"):
        folder.config.write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml"):
            read_config(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x]\nb: *a\n", "alias"),
        ("a: !!python/name:os.system\n", "tag"),
        ("a: !!binary aGk=\n", "tag"),
        ("a: 2001-01-01\n", "neither text nor a number"),
        ("a: 2001-99-99\n", "month must be"),
        ("? [a]\n: b\n", "unhashable key"),
        ("1: b\n", "not text"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: '" + "x" * (1 << 20) + "'", "characters"),
    ],
)
def test_a_strangers_frozen_config_is_read_as_data(tmp_path, text, said):
    folder = RunFolder(tmp_path)
    folder.config.write_text(text)
    with pytest.raises(DataError, match=f"config.yaml cannot be read: .*{said}"):
        read_config(folder)


def test_a_strangers_command_json_is_taken_for_what_it_is(tmp_path):
    folder = RunFolder(tmp_path)
    for text in ("[" * 100_000, "[]", '{"cwd": 5, "argv": {}, "earlier": 1, "pid": 3}'):
        folder.command.write_text(text)
        assert read_command(folder).keys() <= {"pid"}
        write_command(folder, argv=["opsd"])
        assert read_command(folder)["argv"] == ["opsd"]


def test_the_command_is_recorded_and_earlier_ones_are_kept(tmp_path):
    folder = new_run_folder(tmp_path, name="a", hint="x")
    for word in ("one", "two", "three"):
        write_command(folder, argv=["opsd", word])
    record = read_command(folder)
    assert record["argv"] == ["opsd", "three"]
    assert record["cwd"] == os.getcwd()
    assert [earlier["argv"][1] for earlier in record["earlier"]] == ["one", "two"]


def test_the_first_error_is_found_and_set_aside_before_the_next_attempt(tmp_path):
    folder = new_run_folder(tmp_path, name="a", hint="x")
    assert first_error(folder) is None
    write_crash(folder, 1, "Traceback ...\nRuntimeError: boom")
    write_error(folder, 0, "Connection reset", exit_code=3)
    os.utime(folder.error_of(1), (1, 1))
    half = folder.error_of(0).with_name("rank_0.error.tmp-17")  # of a rank that was killed while it wrote
    half.write_text("Conn")
    assert first_error(folder) == RankError(1, "RuntimeError: boom", 1)
    assert "rank 1" in folder.crash.read_text()
    clear_errors(folder)
    assert first_error(folder) is None
    assert not half.exists()
    assert [path.name for path in folder.path.glob("crash*")] == ["crash.1.txt"]


def test_only_a_folder_in_which_nothing_began_is_discarded(tmp_path):
    folder = new_run_folder(tmp_path, name="a", hint="x")
    write_config(folder, {})
    folder.log_of(0).write_text("noise")
    EventLog(folder.events).progress("loading")
    assert discard_unstarted(folder)
    assert not folder.path.exists()
    folder = new_run_folder(tmp_path, name="b", hint="x")
    EventLog(folder.events).write("run_started", **(dict.fromkeys(EVENTS["run_started"], 0) | {"plan": []}))
    assert not discard_unstarted(folder)
    folder = new_run_folder(tmp_path, name="c", hint="x")
    (folder.path / "notes of mine.txt").write_text("keep")
    assert not discard_unstarted(folder)
    assert (folder.path / "notes of mine.txt").exists()


def test_a_second_process_is_refused_with_pid_and_host_of_the_first(tmp_path):
    folder = new_run_folder(tmp_path, name="a", hint="x")
    assert running_process(folder) is None
    holder = hold(folder)
    try:
        message = rf"in use by process {holder.pid} on {os.uname().nodename} "
        with pytest.raises(ConfigError, match=message), run_lock(folder):
            pass
        assert f"process {holder.pid} " in running_process(folder)
    finally:
        holder.communicate()


def test_a_lock_let_go_is_free_and_silent(tmp_path):
    folder = new_run_folder(tmp_path, name="a", hint="x")
    with run_lock(folder):
        pass
    with run_lock(folder) as note:
        assert note is None
    assert running_process(folder) is None


def test_the_lock_of_a_killed_process_is_taken_over_with_a_note(tmp_path):
    folder = new_run_folder(tmp_path, name="a", hint="x")
    holder = hold(folder)
    holder.kill()
    holder.wait()
    with run_lock(folder) as note:
        assert f"process {holder.pid} on" in note
        assert "taken over" in note
        assert json.loads(folder.lock.read_text())["pid"] == os.getpid()
    holder.stdin.close()
    holder.stdout.close()


def test_a_run_of_an_earlier_version_has_what_that_version_did_where_it_had_no_setting(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text("loss:\n  temperature: 1.0\n")
    assert read_config(folder)["loss"] == {"temperature": 1.0, "logits_dtype": "auto", "reduction": "token"}
    for name, lacked in (("jsonl", {"max_bad_share": 0.0}), ("arithmetic", {})):
        folder.config.write_text(f"dataset:\n  name: {name}\n")
        assert read_config(folder)["dataset"] == {"name": name, **lacked}
    was = {"dataset.name": "jsonl", "loss.temperature": 1.0}
    now = {**later(was), **was}
    assert changed_keys({**later(was), **was}, now) == []
    assert changed_keys({**later(was), **was}, now | {"loss.logits_dtype": "float32"})
