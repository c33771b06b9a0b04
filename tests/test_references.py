"""References graded against their own answers before training."""

from __future__ import annotations

from contextlib import closing

import pytest

from opsd_cli.data.answers import AnswerChecker, GradeCounts
from opsd_cli.data.problems import Problem
from opsd_cli.data.references import check_references


def test_references_that_state_their_answers_are_counted_and_nothing_is_said() -> None:
    problems = [Problem(str(i), f"{i} + 1?", f"It makes {i + 1}.", str(i + 1)) for i in range(40)]
    with closing(AnswerChecker()) as checker:
        report = check_references(checker, problems)
    assert str(report) == "references: 40 of 40 are graded right against their own answer"
    assert report.warning is None


def test_references_that_are_graded_wrong_are_a_warning_with_three_examples() -> None:
    good = [Problem(f"good-{i}", "q", "#### yes", "yes") for i in range(16)]
    bad = [Problem(f"bad-{i}", "q", "Because it is so", "yes") for i in range(3)] + [Problem("far", "q", "#### 3", "4")]
    with closing(AnswerChecker()) as checker:
        warning = check_references(checker, [*good, *bad]).warning
    assert warning is not None
    assert "only 16 of 20 reference solutions (80%)" in warning
    assert "bad-0: answer 'yes', the solution states none" in warning
    assert "bad-2" in warning
    assert "far" not in warning


@pytest.mark.slow
def test_answers_that_nobody_can_read_are_a_warning_and_stop_nothing() -> None:
    odd = [Problem(str(i), "q", r"so \boxed{\frac{1}{}", r"\frac{1}{") for i in range(8)]
    odd += [Problem("x", "q", "#### x^2", r"\frac{x}{") for _ in range(8)]
    with closing(AnswerChecker()) as checker:
        report = check_references(checker, odd)
        assert checker.counts == GradeCounts()
    assert report.warning is not None


def test_what_has_no_answer_is_not_graded() -> None:
    with closing(AnswerChecker()) as checker:
        report = check_references(checker, [Problem("1", "q", "words", None)])
    assert (report.graded, report.warning) == (0, None)
