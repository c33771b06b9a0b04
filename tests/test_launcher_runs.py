"""From a config to a finished run, with small real workers in place of the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from launcher_support import WORKER, Screen, config_in, on_cpu, start

from opsd_cli.launch import launchers
from opsd_cli.launch.launchers import EnvLauncher, LocalLauncher
from opsd_cli.launch.start import start_run
from opsd_cli.run.events import read_events
from opsd_cli.run.folder import RunFolder, open_run_folder, read_command, read_config
from opsd_cli.run.lock import run_lock
from opsd_cli.settings.errors import ConfigError, OutsideError
from opsd_cli.settings.typed_config import plain_tree, typed_config
from opsd_cli.ui.display import open_display

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small_worker(tmp_path, monkeypatch):
    script = tmp_path / "worker of mine.py"
    script.write_text(WORKER)
    monkeypatch.setattr(launchers, "WORKER", (str(script),))


def test_a_run_leaves_its_frozen_config_its_command_and_its_logs(tmp_path):
    config, screen = on_cpu(config_in(tmp_path / "my runs")), Screen()
    assert start(config, screen) == 0
    folder = open_run_folder(tmp_path / "my runs" / "hint-001")
    frozen = typed_config(read_config(folder))
    dated = replace(config.prompts, date=frozen.prompts.date)
    assert frozen == replace(config, run=replace(config.run, name="hint-001"), prompts=dated)
    assert date.fromisoformat(frozen.prompts.date or "")
    assert read_command(folder)["argv"] == ["opsd", "train"]
    assert folder.log_of(0).exists()
    assert screen.closed == {"code": 0, "message": "", "tail": []}
    with run_lock(folder) as note:
        assert note is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_a_run_that_lands_on_the_cpu_beside_signs_of_a_gpu_says_so_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config, screen = config_in(tmp_path, name="a"), Screen()
    assert start(config, screen) == 0
    (note,) = screen.notes
    assert note.startswith("running on the CPU although ")
    assert "CPU build; to use a GPU install a CUDA build" in note
    record = read_command(RunFolder(tmp_path / "a"))
    assert record["device"] == "cpu"
    assert record["notes"] == [note]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    start(config_in(tmp_path, name="b"), screen := Screen())
    assert screen.notes == []


@pytest.mark.parametrize("fails", ["open", "poll", "note", "close"])
def test_a_display_that_fails_never_touches_the_run(tmp_path, capsys, fails):
    class Broken(Screen):
        def poll(self):
            assert fails != "poll"

        def close(self, **words):
            self.poll()
            assert fails == "note"

    def broken(run, *, quiet):
        assert fails != "open"
        return Broken()

    config = on_cpu(config_in(tmp_path, name="a"))
    assert start_run(config, task="train", argv=[], hint="x", open_display=broken) == 0
    folder = open_run_folder(tmp_path / "a")
    assert [event["kind"] for event in read_events(folder.events)][-1] == "run_ended"
    said = capsys.readouterr().err
    if fails == "note":
        assert said == ""
        return
    assert said.count("the display failed (AssertionError) and is off; the run goes on") == 1
    assert "AssertionError" in (folder.logs / "display.txt").read_text()


def test_the_last_words_are_said_without_a_display(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPSD_TEST_DO", "refuse")

    def broken(run, *, quiet):
        raise RuntimeError("no terminal")

    assert start_run(on_cpu(config_in(tmp_path, name="a")), task="train", argv=[], hint="x", open_display=broken) == 2
    assert "opsd: dataset.path: no such file 'x'" in capsys.readouterr().err


def test_every_rank_is_told_its_place_its_threads_and_where_to_meet(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = on_cpu(config_in(tmp_path / "runs", name="a"), ranks=2)
    assert start(config, Screen()) == 0
    folder = RunFolder(tmp_path / "runs" / "a")
    told = [json.loads(folder.log_of(rank).read_text().splitlines()[1]) for rank in (0, 1)]
    assert [rank["LOCAL_RANK"] for rank in told] == ["0", "1"]
    assert {rank["WORLD_SIZE"] for rank in told} == {"2"}
    assert len({rank["MASTER_PORT"] for rank in told}) == 1
    assert {rank["DS_ACCELERATOR"] for rank in told} == {"cpu"}
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(1 <= int(rank["OMP_NUM_THREADS"]) <= cores for rank in told)


def test_exit_code_0_without_a_last_word_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_TEST_DO", "silent")
    screen = Screen()
    assert start(on_cpu(config_in(tmp_path, name="a")), screen) == 1
    assert "the run recorded no end" in screen.closed["message"]


def test_a_clock_that_jumps_back_hides_no_last_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPSD_TEST_DO", "jump")
    config = on_cpu(config_in(tmp_path, name="a"))
    assert start_run(config, task="train", argv=[], hint="x", open_display=open_display) == 0
    events = read_events(tmp_path / "a" / "events.jsonl")
    assert events[-1]["time"] < events[0]["time"] - 3000
    assert "run_ended outcome=completed" in capsys.readouterr().err


@pytest.mark.parametrize(("ranks", "prefix"), [(1, ""), (2, "rank 1: ")])
def test_a_refused_run_ends_with_its_message_alone_and_leaves_nothing(tmp_path, monkeypatch, ranks, prefix):
    monkeypatch.setenv("OPSD_TEST_DO", "refuse")
    screen = Screen()
    assert start(on_cpu(config_in(tmp_path / "runs", name="a"), ranks), screen) == 2
    assert screen.closed == {"code": 2, "message": f"{prefix}dataset.path: no such file 'x'", "tail": []}
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_bug_is_shown_with_the_end_of_its_log_and_where_its_traceback_is(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_TEST_DO", "crash")
    screen = Screen()
    assert start(on_cpu(config_in(tmp_path, name="a")), screen) == 1
    folder = RunFolder(tmp_path / "a")
    assert screen.closed["message"] == f"RuntimeError: boom; the traceback is in {folder.crash}"
    assert screen.closed["tail"][-1] == "about to crash"
    assert "RuntimeError: boom" in folder.crash.read_text()
    ended = read_events(folder.events)[-1]
    assert (ended["kind"], ended["outcome"], ended["exit_code"]) == ("run_ended", "failed", 1)


def test_a_killed_rank_is_explained_and_the_events_are_completed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_TEST_DO", "die")
    screen = Screen()
    assert start(on_cpu(config_in(tmp_path, name="a")), screen) == 3
    assert "killed by SIGKILL" in screen.closed["message"]
    assert read_events(tmp_path / "a" / "events.jsonl")[-1]["outcome"] == "failed"


def test_a_name_that_is_taken_starts_no_rank(tmp_path):
    config = on_cpu(config_in(tmp_path, name="a"))
    assert start(config, Screen()) == 0
    with pytest.raises(ConfigError, match="exists and is never overwritten"):
        start(config, Screen())


def test_a_check_that_crashes_leaves_its_traceback_where_the_message_says(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_TEST_DO", "crash")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    screen = Screen()
    assert start(on_cpu(config_in(tmp_path / "runs")), screen, task="check") == 1
    file = Path(screen.closed["message"].rpartition("the traceback is in ")[2])
    assert file.is_relative_to(tmp_path)
    assert "RuntimeError: boom" in file.read_text()


def test_a_check_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert start(on_cpu(config_in(tmp_path / "runs"), ranks=2), Screen(), task="check") == 0
    assert not (tmp_path / "runs").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


RANK_OF_TORCHRUN = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
import launcher_support as own
from dataclasses import replace
from opsd_cli.launch import launchers
root = pathlib.Path(sys.argv[2])
launchers.WORKER = (str(root / "worker of mine.py"),)
config = own.config_in(root / "runs")
env = launchers.EnvLauncher(device="cpu", threads=1, save_seconds=5.0, stall_seconds=None)
screen = own.Screen()
code = own.start(replace(config, launcher=env), screen)
print(screen.quiet, screen.closed, flush=True)
raise SystemExit(code)
"""


def test_ranks_started_from_outside_agree_on_one_folder_and_one_screen(tmp_path):
    ranks = []
    for rank in (1, 0):
        outer = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        outer |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 29511}
        environ = {**os.environ, **{name: str(value) for name, value in outer.items()}}
        command = [sys.executable, "-c", RANK_OF_TORCHRUN, str(Path(__file__).parent), str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=30)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [text.split()[0] for text in said] == ["True", "False"]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("hint-")
    told = [json.loads((folder / "logs" / f"rank_{rank}.log").read_text().splitlines()[1]) for rank in (0, 1)]
    assert {rank["MASTER_PORT"] for rank in told} == {"29511"}
    assert [event["kind"] for event in read_events(folder / "events.jsonl")] == ["progress", "run_started", "run_ended"]


def test_env_without_an_outer_launcher_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = replace(
        config_in(tmp_path / "runs"),
        launcher=EnvLauncher(device="cpu", threads=1, save_seconds=5.0, stall_seconds=None),
    )
    with pytest.raises(ConfigError, match="torchrun or srun"):
        start(config, Screen())
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    own = LocalLauncher(ranks=None, device="cuda", threads=None, save_seconds=5.0, stall_seconds=None)
    with pytest.raises(OutsideError, match=r"torch can use no GPU here: .*launcher\.device=cpu"):
        start(replace(config_in(tmp_path / "runs"), launcher=own), Screen())
    assert not (tmp_path / "runs").exists()


def test_the_frozen_tree_is_the_whole_config(tmp_path):
    config = on_cpu(config_in(tmp_path))
    assert typed_config(plain_tree(config)) == config
