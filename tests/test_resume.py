"""What a continued run accepts, refuses and says, on a real run whose folder was tampered with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import REPOSITORY, TESTS, run_ranks

pytestmark = pytest.mark.slow


def test_a_resume_accepts_refuses_or_warns_of_what_was_done_to_the_run_folder(tmp_path: Path):
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "scripts", TESTS)))
    (output,) = run_ranks([TESTS / "resume_ranks.py", tmp_path], 1, seconds=280, PYTHONPATH=path)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    made = {line["case"]: line for line in map(json.loads, lines)}

    several = made["several_updates"]
    assert several["codes"] == [0, 143, 0]
    assert several["saved"] == "step_000002", "a step that has made an update is finished before it is saved"
    assert several["differences"] == []
    assert all(written > 0 for written in several["written"])

    assert made["nothing"]["code"] == 0
    assert made["nothing"]["steps"] == [1, 2, 3, 4]
    own = made["nothing"]["warnings"]

    assert made["doctored"]["code"] == 2
    assert not made["doctored"]["canary"]
    assert "weights_00000.safetensors holds no pieces of tensors" in made["doctored"]["error"]

    assert made["other_settings"]["code"] == 2
    assert "optim.lr (0.001 -> 0.5)" in made["other_settings"]["error"]
    assert "every" not in made["other_settings"]["error"].partition("put it back")[0], "that may change"

    assert made["of_an_earlier_opsd"]["code"] == 0
    said = [w for w in made["of_an_earlier_opsd"]["warnings"] if w not in own]
    start = "checkpoints/latest was missing or damaged; resumed from the newest complete one, step_0000"
    (pointer,) = (w for w in said if "checkpoints/latest" in w)
    assert pointer.startswith(start)
    model, versions = (w for w in said if w != pointer)
    assert "whether model.path still holds the same weights was not checked" in model
    assert "other versions: torch ('1.0.0' -> '2." in versions

    timed = made["its_seconds_nearly_used"]
    assert (timed["code"], timed["steps"]) == (0, [1, 2, 3, 4][: made["stopped"]["step"] + 1])
    assert made["stopped"]["step"] < 3
    for case in ("nothing", "its_seconds_nearly_used", "no_checkpoints"):
        assert made[case]["saved_seconds"] == pytest.approx(made[case]["used"], rel=1e-6), "of all attempts"

    assert made["other_weights"]["code"] == 2
    assert "the model has changed since" in made["other_weights"]["error"]
    assert "(fingerprint 000000000000, now " in made["other_weights"]["error"]

    assert made["no_checkpoints"]["code"] == 0
    (warning,) = (w for w in made["no_checkpoints"]["warnings"] if w not in own)
    assert warning == "there is no checkpoint to resume from; the run starts again from its beginning"
    assert made["no_checkpoints"]["steps"] == [1, 2, 3, 4]
