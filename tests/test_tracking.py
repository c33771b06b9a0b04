"""Runs in other tools: a tracker gets everything once, also of a resumed run, and cannot harm the run it is sent."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from recipe_support import config_of, problems_of, write_recipe
from run_support import make_run

from opsd_cli.insight.samples import SampleRollout, read_samples
from opsd_cli.insight.track import send
from opsd_cli.insight.trackers import SAMPLE_COLUMNS, TRACKERS, sample_rows
from opsd_cli.launch.tracking import require_tracker, tracked
from opsd_cli.run.events import EventLog, read_events
from opsd_cli.run.folder import RunFolder, discard_unstarted
from opsd_cli.settings.config import TrackSettings
from opsd_cli.settings.errors import ConfigError


class Recording:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.shown: list[tuple[int, int]] = []
        self.ended: list[tuple[dict[str, float], bool]] = []

    def start(self, folder: Path, *, project: str, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        self.started.append({"project": project, "name": name, "identity": identity, "lr": settings["optim.lr"]})

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.logged.append((step, dict(values)))

    def show(self, samples: Sequence[SampleRollout], *, step: int) -> None:
        self.shown.append((step, len(samples)))

    def finish(self, results: Mapping[str, float], *, failed: bool) -> None:
        self.ended.append((dict(results), failed))


def sent(folder: RunFolder, *, kind: str = "recording", project: str = "p") -> Recording:
    tracker = Recording()
    send(folder, tracker, kind=kind, project=project)
    return tracker


def test_a_tracker_gets_settings_steps_evaluations_samples_and_results(tmp_path: Path) -> None:
    tracker = sent(make_run(tmp_path, "a"))
    assert [(start["project"], start["name"], start["lr"]) for start in tracker.started] == [("p", "a", 0.001)]
    steps = {step: values["loss/objective"] for step, values in tracker.logged if "loss/objective" in values}
    assert steps == {step: 1 / step for step in range(1, 21)}
    accuracy = [(step, v["eval/test/student/accuracy"]) for step, v in tracker.logged if "eval/test/student/low" in v]
    assert accuracy == [(0, 0.25), (20, 0.75)]
    assert tracker.shown == [(1, 1), (20, 1)]
    ((results, failed),) = tracker.ended
    assert (results["accuracy_before"], results["accuracy_after"], failed) == (0.25, 0.75, False)


def test_what_was_sent_is_not_sent_again_also_after_a_resume_from_an_earlier_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", outcome="stopped")
    first = sent(folder)
    assert sent(folder).logged == []
    lines = folder.events.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if '"run_ended"' not in line]
    folder.events.write_text("".join(kept), encoding="utf-8")
    log = EventLog(folder.events)
    for step in (19, 20, 21):  # 19 and 20 are repeated
        log.write("step", step=step, metrics={"loss/objective": 5.0, "kl/forward": float("nan")})
    log.close()
    again = sent(folder)
    assert again.logged == [(21, {"loss/objective": 5.0})]  # and what is not finite is left out
    assert again.started[0]["identity"] == first.started[0]["identity"]
    assert again.ended[0][1]  # a run without an end has failed


def test_a_run_that_did_not_begin_is_not_begun_in_a_tracker_and_leaves_no_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", steps=1)
    for path in (folder.events, folder.samples, folder.summary, *folder.evaluations.iterdir()):
        path.unlink()
    folder.evaluations.rmdir()
    assert sent(folder).started == []
    (folder.logs / "track_wandb.log").touch()
    assert discard_unstarted(folder)


def test_a_project_is_a_place_of_its_own_for_a_tracker_that_has_projects(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    whole = len(sent(run).logged)
    assert len(sent(run, project="q").logged) == whole
    assert sent(run).logged == sent(run, project="q").logged == []
    assert len(sent(run, kind="tensorboard").logged) == whole
    assert sent(run, kind="tensorboard", project="q").logged == []  # it writes into the run's folder


WORKING = """
    import json, os
    class Table:
        def __init__(self, columns, data): self.rows = len(data)
    class Run:
        summary = {}
        def log(self, values, step): lines.append((step, sorted(values)))
        def finish(self, exit_code): json.dump([lines, exit_code, self.summary], open("got.json", "w"))
    lines = []
    def init(**words):
        lines.append(("init", sorted(words)))
        return Run()
"""


def track_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> list[str]:
    """Track a finished run with a stand-in for wandb, in the real process; what was noted."""
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "wandb.py").write_text(textwrap.dedent(module), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []
    with tracked(make_run(Path("runs"), "a"), TrackSettings(to="wandb", project="p"), note=notes.append):
        pass
    return notes


@pytest.mark.slow
def test_the_process_that_tracks_sends_the_whole_run_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert track_with(tmp_path, monkeypatch, WORKING) == []
    lines, code, results = json.loads(Path("got.json").read_text(encoding="utf-8"))
    assert len([line for line in lines if "loss/objective" in line[1]]) == 20
    assert [20, ["samples"]] in lines
    assert (code, results["accuracy_after"]) == (0, 0.75)


@pytest.mark.slow
def test_a_tracker_that_fails_is_told_in_a_line_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert track_with(tmp_path, monkeypatch, "raise RuntimeError('no network')") == [
        "wandb was not sent everything (exit code 1): see runs/a/logs/track_wandb.log; the run itself is not affected"
    ]
    assert "no network" in Path("runs/a/logs/track_wandb.log").read_text(encoding="utf-8")
    assert read_events(Path("runs/a/events.jsonl"))[-1]["outcome"] == "completed"


def test_tensorboard_reads_back_what_was_sent(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = make_run(tmp_path, "a")
    send(folder, TRACKERS["tensorboard"](), kind="tensorboard", project="p")
    read = EventAccumulator(str(folder.path / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("loss/objective")] == list(range(1, 21))


def test_every_tracker_is_an_option_and_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in TRACKERS:
        assert config_of("recipe=quickstart", f"track={kind}").track.to == kind
    require_tracker("none")
    monkeypatch.setattr("opsd_cli.launch.tracking.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="track=wandb needs the package wandb: pip install wandb"):
        require_tracker("wandb")


def test_a_recipe_cannot_send_a_run_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    head = "# A spy\n# @package _global_\n"
    for body in ("defaults:\n  - override /track: wandb\n", "track: {to: wandb}\n", "track:\n  to: wandb\n"):
        write_recipe(Path("recipes"), "recipe/spy", head + body)
        assert problems_of("recipe=spy", "model=tiny", "dataset=arithmetic") != (), body


def test_a_sample_is_a_row(tmp_path: Path) -> None:
    rows = sample_rows(read_samples(make_run(tmp_path, "a").samples))
    assert dict(zip(SAMPLE_COLUMNS, rows[0], strict=True))["divergence"] == pytest.approx(11.4)
