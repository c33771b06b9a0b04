"""`opsd train -m`: what is run again and what is not, members at once, Hydra's plug-ins for more."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import support
from recipe_support import members_of, opsd
from run_support import make_run

from opsd_cli import __version__
from opsd_cli.commands.members import Runner
from opsd_cli.insight.earlier_members import Earlier, earlier_members
from opsd_cli.launch.rank_environ import Place, free_port, rank_environ, usable_cores
from opsd_cli.launch.share import Places, at_once, share_of
from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.command_line import parse_line
from opsd_cli.settings.compose import Job, session
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.typed_config import plain_tree

SMALL = (
    "recipe=quickstart", "dataset.train_problems=40", "dataset.validation_problems=0", "dataset.test_problems=8",
    "dataset.retention_problems=0", "train.problems_per_step=2", "train.steps=2", "eval.problems=8",
    "eval.teacher_prompt=false",
)  # fmt: skip
LRS = "optim.lr=1e-4,1e-3"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recorded(sweep: Path) -> list[dict]:
    return [json.loads(line) for line in (sweep / "members.jsonl").read_text().splitlines()]


# What an earlier run of the sweep has left


def member(run: RunFolder, **facts: object) -> Earlier:
    """What is known of a run in the folder `runs`, with facts of command.json changed."""
    command = json.loads(run.command.read_text())
    run.command.write_text(json.dumps({**command, **facts}))
    (found,) = (one for one in earlier_members(run.path.parent, anew=False) if one.name == run.name)
    return found


def with_checkpoint(run: RunFolder) -> RunFolder:
    run.checkpoints.mkdir()
    (run.checkpoints / "latest").write_text("step_000001")
    return run


def test_a_finished_member_is_taken_and_a_stopped_one_continues_where_it_can() -> None:
    root = Path("runs")
    assert member(make_run(root, "finished")).is_taken
    assert member(make_run(root, "guarded", outcome="failed")).is_taken  # exit code 4: it would be stopped again
    assert member(with_checkpoint(make_run(root, "killed", outcome=None))).state == "begun"
    nothing = member(make_run(root, "nothing", outcome=None))
    assert (nothing.state, nothing.why_again) == ("failed", "left no checkpoint")
    assert not any(earlier.is_taken for earlier in earlier_members(root, anew=True))


def test_a_member_of_another_version_or_with_other_plug_ins_is_run_again() -> None:
    run = make_run(Path("runs"), "finished")
    assert member(run, opsd="0.0.9").why_again == "was run by opsd 0.0.9"
    plugins = [{"file": "mine.py", "copy": "mine.py", "sha256": "0"}]
    assert member(run, opsd=__version__, plugins=plugins).why_again == "was run with other plug-ins"


def runner_of(*words: str, folder: Path = Path("runs")) -> tuple[Runner, list[Job]]:
    with session(find_folders()):
        line, _ = parse_line(words, find_folders(), multirun=True)
    jobs = [
        Job(plain_tree(one.config), number, one.typed, None, one.choices)
        for number, one in enumerate(members_of(*words, multirun=True))
    ]
    return Runner(line, folder, len(jobs), task="train", command=(), earlier=earlier_members(folder, anew=False)), jobs


def test_a_member_is_known_by_its_settings_wherever_it_stands_in_the_sweep() -> None:
    make_run(Path("runs"), "0_a", changes={"optim.lr": 1e-3, "launcher.threads": 7, "prompts.date": "2020-01-01"})
    runner, jobs = runner_of("recipe=quickstart", "train.steps=20", "optim.lr=1e-4,1e-3")
    assert [runner.needs_a_process(job) for job in jobs] == [True, False]
    runner, jobs = runner_of("recipe=quickstart", "train.steps=20", "optim.lr=1e-3", "launcher.threads=6,7")
    assert [runner.needs_a_process(job) for job in jobs] == [True, False]  # swept over: it tells members apart
    runner, (job,) = runner_of("recipe=quickstart", "train.steps=20", "optim.lr=1e-3", "prompts.date=2021-01-01")
    assert runner.needs_a_process(job)


@pytest.mark.slow
def test_a_sweep_typed_again_runs_what_is_missing_only(
    capsys: pytest.CaptureFixture[str], warm_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSD_FAULT", "term@step.scored:1")
    code, out, _ = opsd(capsys, "train", "-m", *SMALL, LRS, "optim.schedule=constant")
    assert code == 143
    assert [line.split()[-2] for line in out.splitlines() if line.startswith("optim.lr")] == ["stopped", "run"]
    (sweep,) = Path("runs").iterdir()
    monkeypatch.delenv("OPSD_FAULT")
    code, _, err = opsd(capsys, "train", "-m", *SMALL, LRS, "optim.schedule=constant")
    assert code == 0, err
    assert "opsd: 1/2 optim.lr=0.0001: continues from its last checkpoint" in err
    first = [read for read in (sweep / "0_0.0001" / "events.jsonl").read_text().splitlines() if '"run_started"' in read]
    assert len(first) == 2

    before = {path: path.stat().st_mtime_ns for path in sweep.glob("*/events.jsonl")}
    code, out, err = opsd(capsys, "train", "-m", *SMALL, "optim.lr=1e-4,1e-3,./x", "optim.schedule=constant")
    assert (code, "optim.lr" in err) == (2, True)  # nothing starts where a member is wrong
    code, out, err = opsd(capsys, "train", "-m", *SMALL, LRS, "optim.schedule=constant")
    assert code == 0, err
    assert f"opsd: going on with {sweep}" in err
    assert err.count("finished before, taken as it is: ") == 2
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*/events.jsonl")} == before
    assert len([line for line in out.splitlines() if line.startswith("optim.lr=")]) == 2


@pytest.mark.slow
def test_a_failed_member_is_run_again_and_its_first_attempt_is_kept(
    capsys: pytest.CaptureFixture[str], warm_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSD_FAULT", "raise@step.scored:1")
    words = ("train", "-m", *SMALL, "optim.lr=1e-3", "run.name=s")
    assert opsd(capsys, *words)[0] != 0
    monkeypatch.delenv("OPSD_FAULT")
    code, _, err = opsd(capsys, *words)
    assert code == 0, err
    assert re.search(r"opsd: 1/1: again: failed with exit code \d", err)
    assert (Path("runs/s/aside/0-1/events.jsonl").is_file(), Path("runs/s/0/model").is_dir()) == (True, True)
    code, _, err = opsd(capsys, *words, "--anew")
    assert "again: --anew" in err
    assert Path("runs/s/aside/0-2").is_dir()


def test_flags_of_a_sweep_want_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in (("--parallel", "2"), ("--anew",)):
        code, _, err = opsd(capsys, "train", "recipe=quickstart", *flag)
        assert (code, "add -m" in err) == (2, True)
    code, _, err = opsd(capsys, "train", "-m", "recipe=quickstart", "run.seed=1,2", "--parallel", "0")
    assert (code, "1 or more" in err) == (2, True)
    hosts = ("launcher=deepspeed", "launcher.hostfile=hosts")
    code, _, err = opsd(capsys, "train", "-m", "recipe=quickstart", "run.seed=1,2", *hosts, "--parallel", "2")
    assert (code, "launcher=deepspeed starts ranks on machines" in err) == (2, True)


# A share of the machine


def test_runs_at_once_share_the_cores_and_never_a_port(tmp_path: Path) -> None:
    places = Places(tmp_path, 2)
    for place in range(2):
        environ = rank_environ(places.environ(place), Place(0, 0, 1, 1, "127.0.0.1", 1), device="cpu", threads=None)
        assert environ["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]  # what the user has set wins
        assert {free_port(places.environ(place)) // 2 % 2 for _ in range(20)} == {place}
    shared = rank_environ({"OPSD_SHARE": "1/2"}, Place(0, 0, 1, 1, "127.0.0.1", 1), device="cpu", threads=None)
    assert shared["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2))
    for wrong in ("2/2", "-1/2", "1", "a/b", "0/0"):
        with pytest.raises(ConfigError, match="OPSD_SHARE"):
            share_of({"OPSD_SHARE": wrong})


def test_runs_at_once_have_cards_of_their_own(tmp_path: Path) -> None:
    cards = ("0", "1", "MIG-a", "MIG-b", "7")
    assert at_once(8, cards, ranks=None) == 5
    assert at_once(8, cards, ranks=2) == 2
    assert at_once(2, cards, ranks=None) == 2
    assert at_once(8, (), ranks=None) == 8
    places = Places(tmp_path, 2, cards)
    assert [places.environ(place)["CUDA_VISIBLE_DEVICES"] for place in range(2)] == ["0,1", "MIG-a,MIG-b"]


def test_a_place_is_held_by_one_at_a_time_and_a_stop_reaches_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPSD_SHARE", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "0/1")  # put back after the test
    places = Places(tmp_path, 2)
    monkeypatch.setenv("TBB_NUM_THREADS", "5")  # as a pool of processes sets it for its own
    got: list[int] = []
    with places.take() as first, places.take() as second:
        assert {first, second} == {0, 1}
        assert share_of(os.environ) == (second, 2)
        assert "TBB_NUM_THREADS" not in os.environ
        before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
        places.pass_on(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, before)
    assert got
    assert places.is_stopped


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Two members at once, in processes of their own: folder, output, errors."""
    folder = tmp_path_factory.mktemp("sweep")
    words = ("train", "-m", *SMALL, "run.name=s", "run.seed=0,1", "--parallel", "2")
    done = support.opsd(*words, cwd=folder, cold=True)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "s", done.stdout, done.stderr


@pytest.mark.slow
def test_members_at_once_end_in_one_ranked_table(side_by_side: tuple[Path, str, str]) -> None:
    sweep, out, err = side_by_side
    assert err.startswith(f"opsd: 2 members at once, {max(1, usable_cores() // 2)} of {usable_cores()} cores each\n")
    assert len(re.findall(r"^opsd: [12]/2 run.seed=[01]: \d", err, re.M)) == 2
    rows = [line for line in out.splitlines() if line.startswith("run.seed=")]
    after = [float(re.findall(r"([\d.]+) % \[", row)[-1]) for row in rows]
    assert (len(rows), after) == (2, sorted(after, reverse=True))
    spans = []
    for name in ("0_0", "1_1"):
        events = [json.loads(line) for line in (sweep / name / "events.jsonl").read_text().splitlines()]
        spans.append((events[0]["time"], events[-1]["time"]))
    assert max(start for start, _ in spans) < min(end for _, end in spans)  # they did run at once
    assert not (sweep / ".places").exists()


# Hydra's plug-ins


def needs(module: str) -> None:
    pytest.importorskip(f"hydra_plugins.{module}", reason=f"{module.replace('_', '-')} is not installed")


def cold_sweep(folder: Path, *words: str) -> tuple[list[dict], str]:
    """A sweep as it is typed, in processes that nothing has prepared."""
    done = support.opsd("train", "-m", *SMALL, "run.name=s", *words, cwd=folder, cold=True, seconds=280)
    assert done.returncode == 0, done.stderr
    return recorded(folder / "runs" / "s"), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "module"), [("joblib", "hydra_joblib_launcher"), ("submitit_local", "hydra_submitit_launcher")]
)
def test_hydras_launchers_run_members_at_once(tmp_path: Path, launcher: str, module: str) -> None:
    needs(module)
    done, out = cold_sweep(tmp_path, LRS, f"hydra/launcher={launcher}")
    assert sorted(one["swept"] for one in done) == [["optim.lr=0.0001"], ["optim.lr=0.001"]]
    assert [one["code"] for one in done] == [0, 0]
    assert out.count("optim.lr=") == 2


@pytest.mark.slow
def test_optuna_proposes_trials_and_its_best_is_shown(tmp_path: Path) -> None:
    needs("hydra_optuna_sweeper")
    words = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=1")
    done, out = cold_sweep(tmp_path, "optim.lr=tag(log,interval(1e-4,1e-2))", "divergence=forward_kl,jsd", *words)
    assert len({tuple(one["swept"]) for one in done}) == 4
    table = [line for line in out.splitlines() if line.startswith("optim.lr=")]
    best = re.search(r"^optuna's best trial: (.+), accuracy ([\d.]+) %", out, re.M)
    assert best is not None
    after = [float(re.findall(r"([\d.]+) % \[", row)[-1]) for row in table]
    assert float(best[2]) == max(after) == after[0]


def test_a_sweep_on_slurm_wants_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    needs("hydra_submitit_launcher")
    words: Sequence[str] = ("train", "-m", "recipe=quickstart", "run.seed=1,2", "hydra/launcher=submitit_slurm")
    code, _, err = opsd(capsys, *words)
    assert (code, "sbatch is not on the PATH" in err) == (2, True)


def test_an_optimising_sweep_names_no_code(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train", "-m", "recipe=quickstart", "run.seed=1,2", "hydra.sweeper.custom_search_space=os.system")
    code, _, err = opsd(capsys, *words)
    assert (code, "would name code" in err) == (2, True)


def test_a_large_sweep_is_checked_in_a_moment() -> None:
    members_of("recipe=quickstart")  # imports
    started = time.process_time()
    many = members_of("recipe=quickstart", "optim.lr=1e-5,3e-5,1e-4,3e-4", "run.seed=range(0,16)", multirun=True)
    assert len(many) == 64
    assert time.process_time() - started < 4  # composed once
