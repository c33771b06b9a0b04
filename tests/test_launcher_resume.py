"""The continuation of a run: the same config, the same working directory, few changes, one process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from launcher_support import WORKER, Screen, config_in, on_cpu, resume, start

from opsd_cli.launch import launchers
from opsd_cli.run.events import EventLog
from opsd_cli.run.folder import RunFolder, read_command, read_config
from opsd_cli.run.lock import run_lock
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.typed_config import typed_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small_worker(tmp_path, monkeypatch):
    script = tmp_path / "worker of mine.py"
    script.write_text(WORKER)
    monkeypatch.setattr(launchers, "WORKER", (str(script),))


def stopped_run(tmp_path: Path) -> RunFolder:
    assert start(on_cpu(config_in(tmp_path, name="a")), Screen()) == 0
    folder = RunFolder(tmp_path / "a")
    log = EventLog(folder.events)
    log.truncate(0)
    log.write("run_ended", outcome="stopped", step=2, exit_code=143, message="")
    return folder


def test_a_resume_uses_the_frozen_config_in_the_working_directory_of_the_start(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = stopped_run(tmp_path)
    frozen = folder.config.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert resume(folder.path, Screen()) == 0
    assert folder.config.read_bytes() == frozen
    assert json.loads(folder.log_of(0).read_text().splitlines()[-1])["cwd"] == str(tmp_path / "here")
    assert read_command(folder)["argv"] == ["opsd", "--resume"]
    assert read_command(folder)["earlier"][0]["argv"] == ["opsd", "train"]


def test_a_resume_may_go_further_but_not_become_another_run(tmp_path):
    folder = stopped_run(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resume(folder.path, Screen(), optim__lr=1.0, run__seed=3, train__step=9, launcher__name="env")
    assert len(caught.value.problems) == 4
    assert "optim.lr was" in caught.value.problems[0]
    assert "train.steps" in caught.value.problems[0]
    assert "did you mean 'train.steps'" in caught.value.problems[2]
    assert resume(folder.path, Screen(), train__steps=9, checkpoint__every=2, launcher__threads=1) == 0
    assert typed_config(read_config(folder)).train.steps == 9
    assert read_command(folder)["changes"] == {"train.steps": 9, "checkpoint.every": 2, "launcher.threads": 1}


def test_more_steps_are_refused_where_the_schedule_depends_on_them(tmp_path):
    folder = stopped_run(tmp_path)
    tree = read_config(folder)
    tree["optim"]["schedule"] = "linear"
    folder.config.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"optim\.schedule=linear"):
        resume(folder.path, Screen(), train__steps=9)


def test_a_complete_run_has_nothing_to_resume(tmp_path):
    assert start(on_cpu(config_in(tmp_path, name="a")), Screen()) == 0
    with pytest.raises(ConfigError, match=r"is complete: 4 of 4 steps"):
        resume(tmp_path / "a", Screen())


def test_a_run_in_use_is_not_resumed(tmp_path):
    folder = stopped_run(tmp_path)
    with run_lock(folder), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        resume(folder.path, Screen())


def test_a_resume_sets_the_errors_of_the_attempt_before_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_TEST_DO", "crash")
    assert start(on_cpu(config_in(tmp_path, name="a")), Screen()) == 1
    monkeypatch.setenv("OPSD_TEST_DO", "die")
    screen = Screen()
    assert resume(tmp_path / "a", screen) == 3
    assert not any("about to crash" in line for line in screen.closed["tail"])
    monkeypatch.setenv("OPSD_TEST_DO", "complete")
    screen = Screen()
    assert resume(tmp_path / "a", screen) == 0
    assert screen.closed["message"] == ""
    assert not (tmp_path / "a" / "crash.txt").exists()
    assert (tmp_path / "a" / "crash.1.txt").exists()


@pytest.mark.parametrize(
    "name", ["events.jsonl", "logs/rank_0.log", "summary.json", "checkpoints", "model", "samples.jsonl"]
)
def test_a_link_in_a_run_folder_leads_nowhere(tmp_path, name):
    folder = stopped_run(tmp_path)
    diary = tmp_path / "diary"
    diary.mkdir() if name in ("checkpoints", "model") else diary.write_text("dear diary\n")
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to(diary)
    with pytest.raises(ConfigError, match=f"{name} is a symbolic link, and a run writes only inside its own folder"):
        resume(folder.path, Screen())
    assert diary.is_dir() or diary.read_text() == "dear diary\n"
    assert not diary.is_dir() or not any(diary.iterdir())


def test_code_that_a_frozen_config_allows_must_be_allowed_again(tmp_path):
    folder = stopped_run(tmp_path)
    tree = read_config(folder)
    tree["model"] |= {"trust_remote_code": True, "revision": "0" * 40}
    folder.config.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"runs code that comes with .*model\.trust_remote_code=true"):
        resume(folder.path, Screen())
    assert resume(folder.path, Screen(), model__trust_remote_code=True) == 0
