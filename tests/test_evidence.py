"""The scripts behind docs/evidence.md measure what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_support import make_run
from support import REPOSITORY

from opsd_cli.insight.history import read_history

sys.path.insert(0, str(REPOSITORY / "scripts" / "bench"))

import forgetting
import gap_and_gain

TINY = str(REPOSITORY / "opsd_cli" / "assets" / "tiny")
TEACHER = str(REPOSITORY / "opsd_cli" / "assets" / "tiny_teacher")


@pytest.mark.slow
def test_a_model_has_not_moved_from_itself_and_another_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.md"
    text.write_text("Mia has 4 coins. Then Mia buys 3 more. How many coins does Mia have now? " * 20)
    assert forgetting.main([TINY, TEACHER, "--text", str(text)]) == 0
    same, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert (same["text_kl"], same["replies_kl"]) == (0.0, 0.0)
    assert other["text_kl"] > 0.001
    assert other["replies_kl"] > 0.001
    assert same["text_perplexity"] > 1


def test_a_run_with_both_roles_before_and_the_student_after_is_a_point(tmp_path: Path) -> None:
    make_run(tmp_path, "whole", right=(10, 30), changes={"context.control": "shuffled", "run.seed": 3})
    run = read_history(tmp_path / "whole")
    assert gap_and_gain.point_of(run) is None, "it has not measured the teacher"
    measured = replace(run, summary={**run.summary, "teacher_before": {"accuracy": 0.9}})
    point = gap_and_gain.point_of(measured)
    assert point == gap_and_gain.Point("tiny", "shuffled", 3, gap=pytest.approx(65.0), gain=pytest.approx(50.0))
    assert gap_and_gain.point_of(replace(measured, state="stopped")) is None
    gap_and_gain.draw([point, replace(point, arm="none")], tmp_path / "points.png")
    assert (tmp_path / "points.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_points_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "alone")
    assert gap_and_gain.main([str(tmp_path / "alone")]) == 2
    assert "fewer than two runs" in capsys.readouterr().err
