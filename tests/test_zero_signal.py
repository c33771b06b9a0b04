"""The best single check of the whole method: a teacher that is the student and sees no more than it has nothing to
teach. Through the real loop, engine and model."""

from __future__ import annotations

import json

import pytest
from support import TESTS, run_ranks
from test_methods import tree_of

from opsd_cli.settings.registry import plugin_names

pytestmark = pytest.mark.slow

DIVERGENCES = [name for name in plugin_names("divergence") if name != "cross_entropy"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    trees = [tree_of("teacher=live", "context=none", f"divergence={divergence}") for divergence in DIVERGENCES]
    file = tmp_path_factory.mktemp("zero") / "plan.json"
    file.write_text(json.dumps({"zero": trees}))
    run_ranks([TESTS / "method_steps_ranks.py", file], 1)
    return json.loads(file.with_suffix(".found").read_text())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_live_teacher_without_context_gives_objective_and_gradient_zero(found, divergence: str):
    metrics = found[f"zero {DIVERGENCES.index(divergence)}"]
    assert metrics["loss/objective"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["kl/forward"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["optim/grad_norm"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["agree/top1"] == 1.0
