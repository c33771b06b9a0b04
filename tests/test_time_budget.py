"""train.seconds: steps end when their seconds are used up, on every rank after the same step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from recipe_support import config_of, opsd, problems_of

from opsd_cli.engine.process_group import alone
from opsd_cli.launch.start import seconds_of_steps
from opsd_cli.run.folder import RunFolder, write_config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.resume_rules import apply_changes
from opsd_cli.settings.typed_config import plain_tree
from opsd_cli.training.time_budget import TimeBudget


class SecondRank:
    """The view of another rank than the first, whose clock says 2.5 seconds."""

    rank, world_size = 1, 2

    def all_sum(self, values: list[float]) -> list[float]:
        return [value + 2.5 for value in values]


def optim(**changes: object):
    return dataclasses.replace(config_of("recipe=quickstart").optim, **changes)


def test_all_ranks_count_by_the_clock_of_the_first() -> None:
    first, second = TimeBudget(4.0), TimeBudget(4.0)
    for _ in range(2):
        assert not first.is_used_up
        first.add_step(2.5, alone())
        second.add_step(99.0, SecondRank())  # type: ignore[arg-type]
    assert first.used == second.used == 5.0
    assert first.is_used_up
    assert second.is_used_up


def test_without_a_budget_nothing_ends_and_the_schedule_counts_steps() -> None:
    time = TimeBudget(None)
    time.add_step(1e9, alone())
    assert not time.is_used_up
    assert [time.scheduled_step(step, optim(), steps=10) for step in range(3)] == [0, 1, 2]


def test_after_warm_up_the_schedule_follows_the_time_where_that_is_further() -> None:
    time, settings = TimeBudget(10.0), optim(warmup_steps=2)
    time.used = 5.0
    assert time.scheduled_step(1, settings, steps=102) == 1
    assert time.scheduled_step(2, settings, steps=102) == 2 + 50
    assert time.scheduled_step(60, settings, steps=102) == 60
    time.used = 11.0
    assert time.scheduled_step(2, settings, steps=102) == 102


def test_the_seconds_of_a_run_change_on_a_resume_only_where_the_learning_rate_does_not_depend_on_them() -> None:
    tree = plain_tree(config_of("recipe=quickstart", "train.seconds=5", "optim.schedule=constant"))
    assert apply_changes(tree, {"train.seconds": 9.0})["train"]["seconds"] == 9.0
    with pytest.raises(ConfigError, match=r"train\.seconds cannot change"):
        apply_changes(plain_tree(config_of("recipe=quickstart", "train.seconds=5")), {"train.seconds": 9.0})
    assert problems_of("recipe=quickstart", "train.seconds=0")


def test_a_run_that_has_used_its_seconds_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "r")
    folder.path.mkdir(parents=True)
    write_config(folder, plain_tree(config_of("recipe=quickstart", "train.seconds=5")))
    lines = [{"kind": "step", "step": step, "metrics": {"time/step": 2.5}} for step in (1, 2)]
    lines += [{"kind": "run_ended", "outcome": "completed", "step": 2, "exit_code": 0, "message": ""}]
    folder.events.write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines))
    assert seconds_of_steps(folder) == 5.0
    code, _, err = opsd(capsys, "train", "--resume", "runs/r")
    assert code == 2
    assert "2 steps took 5.0 s of train.seconds=5" in err
