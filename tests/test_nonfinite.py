"""A gradient that is not finite never reaches the weights."""

from __future__ import annotations

from pathlib import Path

from gradient_ranks import make_model
from support import TESTS, run_ranks


def test_a_gradient_that_is_not_finite_is_refused_before_the_update_at_every_stage(tmp_path: Path):
    make_model(tmp_path / "tied", tied=True)
    (output,) = run_ranks([TESTS / "nonfinite_ranks.py", tmp_path], 1)
    lines = [line for line in output.splitlines() if line.startswith("stage")]
    assert [line.split(":")[0] for line in lines] == ["stage 0", "stage 1", "stage 2", "stage 3"]
    assert all("refused, weights unchanged: True" in line for line in lines), lines
    assert all("step 1: the gradient is not finite" in line for line in lines)
