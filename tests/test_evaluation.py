"""Accuracy and its interval."""

from __future__ import annotations

import pytest

from opsd_cli.insight.evaluation import wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (131, 500, 0.2255, 0.3022)],
)
def test_the_interval_is_wilsons(successes: int, trials: int, low: float, high: float):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-4)
