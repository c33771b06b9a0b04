"""launcher=slurm: the text of the batch script, what becomes of an attempt, and a run in a real cluster where this
machine can have one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from launcher_support import Screen, config_in, resume, section
from launcher_support import start as start_in
from recipe_support import problems_of, write_recipe
from slurm.cluster import missing_tools

from opsd_cli.engine.process_group import lost_connection
from opsd_cli.launch.exit_messages import Explained, explain_by_others
from opsd_cli.launch.launchers import EnvLauncher
from opsd_cli.launch.rank_environ import Place
from opsd_cli.launch.slurm import SlurmLauncher, is_in_job, submission
from opsd_cli.launch.slurm_job import JobAttempt, environ_of_ranks, reason_to_go_on, why_not_again
from opsd_cli.launch.slurm_queue import JobState, clean_environ
from opsd_cli.launch.supervisor import Ended
from opsd_cli.run.events import EventLog
from opsd_cli.run.folder import RunFolder, new_run_folder, write_command, write_config
from opsd_cli.run.rank_errors import read_error, write_error
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, OutsideError
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.recipe_scan import scan
from opsd_cli.settings.registry import SetsRanks
from opsd_cli.settings.typed_config import plain_tree, typed_config

ROOT = Path(__file__).parents[1]


def config_with(root: Path, **changes: Any) -> Config:
    tree = plain_tree(config_in(root))
    return typed_config(tree | {"launcher": section("launcher", "slurm") | changes})


def launcher_with(**changes: Any) -> SlurmLauncher:
    launcher = config_with(Path("runs"), **changes).launcher
    assert isinstance(launcher, SlurmLauncher)
    return launcher


def env_launcher() -> EnvLauncher:
    return EnvLauncher(device="cpu", threads=None, save_seconds=5.0, stall_seconds=None)


def script_of(folder: str = "/shared/runs/a", *, task: str = "train", **changes: Any) -> str:
    return launcher_with(**changes).script(RunFolder(Path(folder)), task=task, trusts=False)


def options_of(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}


def test_the_script_asks_for_what_the_settings_say():
    script = script_of(
        nodes=2, ranks_per_node=8, cpus_per_rank=6, memory_per_node="500G", time="2-00:00:00", partition="gpu",
        account="lab", qos="high", constraint="a100&nvlink", sbatch=["--exclude=n7", "--exclusive"],
    )  # fmt: skip
    assert options_of(script) >= {
        "--job-name=opsd-a", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=6",
        "--mem=500G", "--time=2-00:00:00", "--partition=gpu", "--account=lab", "--qos=high",
        "--constraint=a100&nvlink", "--signal=B:USR1@300", "--open-mode=append", "--requeue", "--exclude=n7",
        "--exclusive",
    }  # fmt: skip
    assert "srun --kill-on-bad-exit=1" in script
    assert "--nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=6" in script, "srun takes no cpus from the job"


def test_gpus_are_one_for_each_rank_unless_it_is_said_otherwise():
    def gpus(**changes: Any) -> list[str]:
        return [option for option in options_of(script_of(ranks_per_node=4, **changes)) if "gpu" in option]

    assert gpus() == ["--gpus-per-node=4"]
    assert gpus(device="cpu") == []
    assert gpus(gpus_per_node=2) == ["--gpus-per-node=2"]
    assert gpus(gpus_per_node=0) == []


def test_a_job_that_may_not_start_again_says_so_to_slurm():
    assert "--no-requeue" in options_of(script_of(restarts=0))


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    root=st.text(st.characters(codec="utf-8", exclude_characters="/\\\0\n\r", categories=["L", "N", "P", "S", "Zs"])),
    setup=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r", categories=["L", "N", "P", "Zs"]))
    ),
)
def test_whatever_a_path_is_called_the_script_starts_the_ranks_of_that_run(root: str, setup: list[str]):
    folder = Path("/shared") / f"x{root}" / "a"
    script = launcher_with(setup=setup).script(RunFolder(folder), task="train", trusts=False)
    ours = script[script.rindex("exec ") :]
    words = shlex.split(ours.replace("\\\n", " "))
    assert words[words.index("opsd_cli.launch.slurm_job") + 1] == str(folder)
    assert words[words.index("--resume") + 1] == str(folder)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "last.sh"
        file.write_text(ours, encoding="utf-8")
        assert subprocess.run(["bash", "-n", file], check=False).returncode == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "a b"), ("partition", "a;reboot"), ("account", "$(id)"), ("qos", "x\n#SBATCH --uid=0"),
        ("constraint", 'a" --wrap="x'), ("time", "1h"), ("time", "60; id"), ("memory_per_node", "lots"),
        ("sbatch", ["-p x"]), ("sbatch", ["--comment=a b"]), ("sbatch", ["--x=a\n#SBATCH --y"]),
        ("setup", ["a\nb"]), ("nodes", 0), ("signal_seconds", 100_000),
    ],
)  # fmt: skip
def test_a_value_that_would_say_more_than_it_should_is_refused(key: str, value: object):
    with pytest.raises(ConfigError, match=f"launcher.{key}"):
        launcher_with(**{key: value})


@pytest.mark.parametrize(
    ("option", "said"),
    [("--partition=x", "set launcher.partition"), ("--wrap=id", "leave it out"), ("--mem=1G", "memory_per_node")],
)
def test_an_option_that_has_a_setting_or_is_ours_is_refused(option: str, said: str):
    with pytest.raises(ConfigError, match=said):
        script_of(sbatch=[option])


def test_a_percent_sign_in_a_path_is_not_a_pattern_of_sbatch_and_a_backslash_is_refused():
    words = submission(RunFolder(Path("/s/50%j/a")), Path("/s/job.sh"), Path("/work"))
    assert "--output=/s/50%%j/a/slurm/job-%j.log" in words
    with pytest.raises(ConfigError, match="backslash"):
        submission(RunFolder(Path("/s/a\\b/a")), Path("/s/job.sh"), Path("/work"))


def test_nothing_that_another_launcher_has_left_reaches_a_job():
    left = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "9", "RANK": "3", "MASTER_ADDR": "x", "OMPI_COMM_WORLD_RANK": "1"}
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "NCCL_SOCKET_IFNAME": "ib0"}
    assert clean_environ(left | kept) == kept
    ranks = environ_of_ranks(left | kept, "1")
    assert ranks == kept | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "9", "OPSD_SLURM_JOB": "1"}
    assert is_in_job(ranks | {"SLURM_STEP_ID": "0"})
    assert not is_in_job(ranks | {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "2"}), "a job that was submitted in a job"


RUNNING = {"JobState": "RUNNING", "PreemptTime": "None"}


def test_a_run_goes_on_by_itself_unless_it_is_done_or_somebody_stopped_it():
    def why(code: int, *, asked: bool = False, **facts: str) -> str:
        return reason_to_go_on(code, was_asked=asked, facts=RUNNING | facts)

    assert why(143, asked=True) == "time limit"
    assert why(143, PreemptTime="2026-01-01T00:00:00") == "preemption"
    assert why(3) == "environment"
    assert why(3, asked=True) == "environment"
    assert why(143) == "", "somebody sent the ranks SIGTERM"
    assert why(143, JobState="COMPLETING") == "", "scancel"
    assert why(0, asked=True) == ""
    assert [why(code) for code in (1, 2, 4)] == ["", "", ""]


def test_a_job_is_not_queued_again_for_ever():
    def attempt(restart: int, *, is_new: bool) -> JobAttempt:
        return JobAttempt("1", restart, 3, "environment", "step_000001", is_new)

    assert why_not_again(attempt(0, is_new=False), [], restarts=20) == ""
    assert why_not_again(attempt(1, is_new=True), [attempt(0, is_new=False)], restarts=20) == ""
    assert "saved nothing new" in why_not_again(attempt(1, is_new=False), [attempt(0, is_new=False)], restarts=20)
    assert "launcher.restarts is 1" in why_not_again(attempt(1, is_new=True), [], restarts=1)


def test_a_job_that_waits_says_why_and_one_that_runs_says_where():
    assert str(JobState("PENDING", "Resources", "")) == "pending (Resources)"
    assert str(JobState("RUNNING", "None", "n[1-2]")) == "running (n[1-2])"
    assert not JobState("COMPLETING").is_over
    assert all(JobState(name).is_over for name in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE"))


def test_a_machine_without_slurm_is_one_line_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on the PATH"):
        start_in(config_with(tmp_path / "runs"), Screen())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("base", "line"),
    [("slurm", "setup: [touch canary]"), ("slurm", "sbatch: [--export=LD_PRELOAD=x]"), ("slurm", "setup: ${run.root}"),
     ("deepspeed", "runner_args: --mca plm_rsh_agent canary")],
)  # fmt: skip
def test_a_recipe_may_not_say_what_a_launcher_runs(
    base: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(Path("recipes"), "launcher/mine", f"defaults: [{base}, _self_]\nname: {base}\n{line}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:3: a recipe may not say what a launcher runs"):
        scan(find_folders())
    write_recipe(Path("recipes"), "launcher/mine", "defaults: [slurm, _self_]\npartition: gpu\nsetup: []\n")
    assert problems_of("recipe=quickstart", "launcher=mine") == ()


def test_a_run_folder_of_a_stranger_does_not_decide_what_a_job_runs(tmp_path: Path) -> None:
    folder = new_run_folder(tmp_path, name="a", hint="")
    write_config(folder, plain_tree(config_with(tmp_path, setup=["touch /tmp/canary"])))
    with pytest.raises(ConfigError, match=r"launcher.setup=\['touch /tmp/canary'\].*type it again"):
        resume(folder.path, Screen())


def test_the_cause_is_the_rank_that_was_killed_and_not_what_it_did_to_the_others(tmp_path: Path) -> None:
    folder, place = new_run_folder(tmp_path, name="a", hint=""), Place(0, 0, 2, 1, "n1", 15000)
    write_error(folder, 0, "RuntimeError: Connection closed by peer", exit_code=1)
    write_error(folder, 1, "the process was killed by SIGKILL", exit_code=3, was_sudden=True)
    killed = Explained(3, "rank 1: the process was killed by SIGKILL")
    lost = Explained(1, "RuntimeError: Connection closed by peer")
    assert explain_by_others(lost, Ended("failed", 1, 0, 1), folder, place) == killed
    assert explain_by_others(Explained(143), Ended("stopped", 143), folder, place) == killed, "srun ended the others"
    done = Explained(0)
    assert explain_by_others(done, Ended("completed", 0), folder, place) == done


def test_a_rank_that_was_killed_under_srun_leaves_word_for_the_others(tmp_path: Path) -> None:
    folder, place = new_run_folder(tmp_path, name="a", hint=""), Place(1, 0, 2, 1, "n1", 15000)
    said = explain_by_others(Explained(3, "killed"), Ended("failed", 3, 1, -9), folder, place)
    assert said == Explained(3, "killed")
    error = read_error(folder, 1)
    assert error is not None
    assert (error.exit_code, error.message, error.was_sudden) == (3, "killed", True)


GLOO = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.12]:44227. This is typically caused by"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("NCCL error in: x.cpp:1\nncclRemoteError: A call failed possibly due to a network error"), True),
        (ConnectionResetError("[Errno 104] Connection reset by peer"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (OutsideError("hub: Connection refused"), False),
    ],
)
def test_a_rank_that_lost_another_one_has_no_bug_of_its_own(error: Exception, is_lost: bool) -> None:
    """On a machine that lost power nobody is left to say so; the job must be queued again, as after exit code 3."""
    assert bool(lost_connection(error)) == is_lost


STEP = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
STEP |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NODEID": "0"}


def in_step(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in (STEP | changes).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_complete_run_whose_job_is_queued_again_is_left_as_it_is(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step(monkeypatch, SLURM_PROCID=rank, SLURM_RESTART_COUNT="1")
    config = config_with(tmp_path)
    config = replace(config, run=replace(config.run, name="a"), launcher=env_launcher())
    folder = new_run_folder(tmp_path, name="a", hint="")
    write_config(folder, plain_tree(config))
    write_command(folder, argv=[], launch="slurm7")
    log = EventLog(folder.events)
    log.write("run_ended", outcome="completed", step=config.train.steps, exit_code=0, message="")
    log.close()
    before, screen = folder.events.read_bytes(), Screen()
    assert start_in(config, screen) == 0
    assert "is complete" in screen.notes[0]
    assert folder.events.read_bytes() == before


def test_a_rank_whose_run_folder_is_another_runs_does_not_wait_for_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step(monkeypatch, SLURM_PROCID="1")
    config = config_with(tmp_path)
    config = replace(config, run=replace(config.run, name="a"), launcher=env_launcher())
    write_command(new_run_folder(tmp_path, name="a", hint=""), argv=[], launch="slurm6")
    with pytest.raises(ConfigError, match="exists and is never overwritten"):
        start_in(config, Screen())


def test_ranks_of_all_nodes_are_known_before_any_starts(tmp_path: Path) -> None:
    config = config_with(tmp_path, nodes=4, ranks_per_node=8)
    assert isinstance(config.launcher, SetsRanks)
    assert config.launcher.ranks == 32


@pytest.mark.slow
def test_a_real_cluster_runs_a_job_of_two_nodes(tmp_path: Path) -> None:
    if lacking := missing_tools():
        pytest.skip(f"this machine lacks {', '.join(lacking)}: scripts/slurm.sh --install")
    command = [sys.executable, str(ROOT / "scripts/slurm_check.py"), "--minutes=4", "--only", "smallest"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert (done.returncode, "1 of 1 as expected" in done.stdout) == (0, True), done.stdout + done.stderr
