"""`opsd probe`: what is measured before training, and what is said of it."""

from __future__ import annotations

import json

import pytest
from recipe_support import opsd

from opsd_cli.insight.estimates import Estimate
from opsd_cli.insight.paired import wilson_interval
from opsd_cli.insight.prospects import CONTROL, STUDENT, TEACHER, Arm, Copying, Probe, Sampled, as_dict, judge

PROBLEMS = 60


def arm(right: int) -> Arm:
    """The first so many of 60 problems are right."""
    low, high = wilson_interval(right, PROBLEMS)
    return Arm(right / PROBLEMS, low, high, 0.0, 9.0, {f"p{i}": i < right for i in range(PROBLEMS)})


def probe(**changes: object) -> Probe:
    """A student with 12 of 60 right whose teacher has 40; what is changed is given by name."""
    arms = {STUDENT: arm(12), TEACHER: arm(40), CONTROL: arm(11), "all but last": arm(30), "answer only": arm(20)}
    facts = {
        "average": Estimate(0.18, 0.1, 0.26), "truncated": 0.02, "recovery": Estimate(0.4, 0.3, 0.5), "copied": 0.1,
        "arms": {},
    } | changes  # fmt: skip
    repaired, again = Estimate(0.5, 0.4, 0.6), Estimate(0.1, 0.05, 0.15)
    sampled = Sampled(
        4, facts["average"], {1: 0.18, 4: 0.4}, facts["truncated"], 0.9, repaired, again, facts["recovery"]
    )  # type: ignore[arg-type]
    copying = Copying(Estimate(facts["copied"], 0.0, 1.0), 0.02)  # type: ignore[arg-type]
    return Probe("recipe=x", PROBLEMS, arms | facts["arms"], sampled, copying, {})  # type: ignore[operator]


def verdict_of(**changes: object):
    return judge(probe(**changes), temperature=1.0, max_tokens=128)


def test_a_gap_that_the_reference_makes_is_worth_training() -> None:
    found = verdict_of()
    assert found.outlook == "likely"
    assert len(found.reasons) == 3
    assert found.reasons[0].startswith("the teacher's prompt helps: +46.7 points [")


@pytest.mark.parametrize(
    ("changes", "outlook", "reason"),
    [
        ({"arms": {TEACHER: arm(13)}}, "unlikely", "does not surely help"),
        ({"arms": {STUDENT: arm(58), TEACHER: arm(60)}}, "unlikely", "has 96.7% right already"),
        ({"arms": {CONTROL: arm(39)}}, "unlikely", "another problem's reference helps as much"),
        ({"recovery": Estimate(0.02, -0.03, 0.07)}, "unlikely", "repairs no more than another try"),
        ({"truncated": 0.5}, "uncertain", "raise sampling.max_completion_tokens (now 128)"),
        ({"average": Estimate(0.03, 0.0, 0.06)}, "uncertain", "lower sampling.temperature (now 1)"),
        ({"arms": {"answer only": arm(40), "all but last": arm(12)}}, "uncertain", "the teacher may copy"),
        ({"copied": 0.9}, "uncertain", "a wrong reference teaches a wrong answer"),
    ],
)
def test_what_speaks_against_training_is_said(changes: dict[str, object], outlook: str, reason: str) -> None:
    found = verdict_of(**changes)
    assert found.outlook == outlook
    assert reason in found.reasons[0]


def test_everything_is_there_for_programs() -> None:
    told = json.loads(json.dumps(as_dict(probe(), verdict_of())))
    assert told["gain_over_student"][TEACHER]["won"] == 28
    assert told["teacher_over_control"]["gain"] == pytest.approx(29 / 60)
    assert told["sampled"]["passed"] == {"1": 0.18, "4": 0.4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a recipe"),
        (("recipe=quickstart", "method=sft"), "there is no teacher to probe"),
        (("recipe=quickstart", "method=opd"), "the teacher is another model; measure it with `opsd eval"),
        (("recipe=quickstart", "context=feedback", "train.rollouts_per_problem=2"), "made of a step's rollouts"),
        (("recipe=quickstart", "--rollouts", "0"), "--rollouts 0: 1 to 64"),
        (("recipe=quickstart", "--problems", "1"), "needs at least 2"),
        (("recipe=quickstart", "eval.problems=0"), "no held-out problems"),
    ],
)
def test_what_cannot_be_probed_is_told(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = opsd(capsys, "probe", *words)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_the_quickstart_is_worth_training_and_its_control_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled model reads its reference, and what it does with it is known (docs/quickstart.md)."""
    words = ("recipe=quickstart", "--problems", "24", "--rollouts", "2", "dataset.train_problems=40")
    code, out, _ = opsd(capsys, "probe", *words, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["outlook"] == "likely"
    arms = told["arms"]
    assert arms[TEACHER]["accuracy"] > 0.9
    assert arms[CONTROL]["accuracy"] < arms[STUDENT]["accuracy"] < 0.6
    assert {"first step", "all but last", "answer only", "misleading reference"} <= arms.keys()
    assert told["sampled"]["recovery"]["low"] > 0.5
    assert 0 <= told["copying"]["unprompted"] < 0.3
    assert told["divergence_by_class"]["number"]["share"] > 0.9
    code, out, _ = opsd(capsys, "probe", "recipe=quickstart", "--problems", "8", "--rollouts", "1", "context=none")
    assert code == 0
    assert "Training is unlikely to help" in out
