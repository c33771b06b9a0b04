"""The scripts behind docs/evidence.md measure what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from run_support import make_run
from support import REPOSITORY

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


def test_runs_are_points_of_gap_and_gain_and_others_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "alone")
    assert gap_and_gain.main([str(tmp_path / "alone")]) == 2
    assert "fewer than two runs" in capsys.readouterr().err
