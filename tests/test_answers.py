"""Finding and grading final answers: what counts as an answer, and that hostile text is survived and counted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsd_cli.data.answer_forms import form_of, grade_exactly
from opsd_cli.data.answer_marks import marked_answer
from opsd_cli.data.answers import AnswerChecker, GradeCounts, as_latex
from opsd_cli.data.stated_answers import find_answer
from opsd_cli.settings.errors import GuardError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with closing(AnswerChecker(seconds=2.0, max_error_share=1.0)) as shared:
        yield shared


def correct(checker: AnswerChecker, *pairs: tuple[str, str]) -> list[bool]:
    return [grade.correct for grade in checker.grade([(text, (gold,)) for text, gold in pairs])]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sold 48/2 = 24 clips.\n#### 72", "72"),
        ("all on one line #### 72", "72"),
        ("#### 1,080\n", "1,080"),
        ("#### -5\nSo that is it.", "-5"),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"first \boxed{1}, no, \boxed{2}", "2"),
        (r"whole \boxed{3} and cut off \boxed{4", "3"),
        ("#### 5\nbetter: \\boxed{6}", "6"),
        ("\\boxed{6}\n#### 5", "5"),
        ("#### Step 1: halve\nHalf is 4.\n#### Step 2: add\nThe sum is \\boxed{12}.", "12"),
        ("The total is 3 apples and 14 pears, which makes 17.", "17"),
        ("It costs $1,234.50 in all", "$1,234.50"),
        ("It is 16-3", None),
        ("It fell to -3.", "-3"),
        ("three quarters is 3/4", "3/4"),
        ("I do not know", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_answer_is_the_last_mark_or_else_the_last_number(text: str, answer: str | None) -> None:
    assert find_answer(text, "number") == answer


def test_a_number_without_a_mark_is_no_marked_answer() -> None:
    assert marked_answer("It makes 17.") is None


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("72", "72", True),
        ("72.0", "72", True),
        ("072", "72", True),
        ("1,080", "1080", True),
        ("1{,}080", "1080", True),
        ("(1,200)", "1200", None),
        ("$72", "72", True),
        (r"\$72.00", "72", True),
        ("72 clips", "72", True),
        (r"72 \text{ clips}", "72", True),
        ("72.", "72", True),
        ("**72**", "72", True),
        ("x = 72", "72", True),
        ("50%", "50", True),
        (r"50\%", "0.5", True),
        ("−5", "-5", True),  # noqa: RUF001
        ("73", "72", False),
        ("0.1", "0.10000001", False),
        ("72 thousand", "72", False),
        ("3 pi", "3", None),
        ("1/2", "0.5", True),
        ("Paris", "paris", True),
        (r"\text{Paris}", "Paris", True),
        ("(B)", "B", True),
        ("B", "A", False),
        ("silent", "listen", False),
        (r"\pi", "pi", None),
    ],
)
def test_plain_numbers_and_words_are_compared_exactly(answer: str, gold: str, correct: bool | None) -> None:
    assert grade_exactly(answer, gold) is correct


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        ("1 + x", "x+1", True),
        ("(1, 200)", "(1,200)", True),
        (r"\{2, 1\}", r"\{1,2\}", True),
        (r"\frac{1+1}{3}", "0.5", False),
        ("9**9", "9", False),
    ],
)
def test_mathematics_is_compared_by_math_verify(checker: AnswerChecker, answer: str, gold: str, right: bool) -> None:
    before = replace(checker.counts)
    assert grade_exactly(answer, gold) is None
    assert correct(checker, (f"so \\boxed{{{answer}}}", gold)) == [right]
    assert checker.counts == replace(before, graded=before.graded + 1)


HOSTILE = [
    "9^{9^{9}}",
    "9**9**9**9",
    "99999999!",
    "2^{2^{2^{2^{2^{2}}}}}",
    r"\int_0^1 x^{x^{x^{x}}} dx",
    "(1" * 300,
    "1" * 900,
    r"\frac{" * 100 + "1",
    "(" * 500 + ")" * 500,
    r"\sum_{n=1}^{10^{12}} n",
    r"__import__('os').system('true')",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_a_pathological_answer_is_answered_within_the_limit(checker: AnswerChecker, answer: str) -> None:
    started = time.monotonic()
    (right,) = correct(checker, (f"#### {answer}", "7"))
    # The limit of 2 s, and the start of a new child when the one before was killed.
    assert time.monotonic() - started < 8
    assert not right


def test_ten_megabytes_of_anything_are_graded_at_once(checker: AnswerChecker) -> None:
    started = time.monotonic()
    for text in ("\\boxed{" * 1_500_000, "{" * 10_000_000, "#### " * 2_000_000, "9" * 10_000_000, "a\n" * 5_000_000):
        assert correct(checker, (text, "7")) == [False]
    assert time.monotonic() - started < 5


def test_a_timeout_is_counted_and_the_child_is_reaped_and_replaced() -> None:
    with closing(AnswerChecker(seconds=1.0, max_error_share=1.0)) as checker:
        before = _children()
        assert correct(checker, ("#### 9^{9^{9}}", "7"), (r"#### \frac{7+7}{2}", "7")) == [False, True]
        assert checker.counts == GradeCounts(graded=2, timeouts=1)
        assert len(_children() - before) == 1
    assert _children() <= before


def _children() -> set[int]:
    """Processes below this one, zombies too."""
    tasks = f"/proc/{os.getpid()}/task"
    return {int(child) for task in os.listdir(tasks) for child in open(f"{tasks}/{task}/children").read().split()}


def test_a_checker_that_fails_too_often_stops_the_run() -> None:
    unreadable_gold = r"\frac{1}{"
    with (
        closing(AnswerChecker(seconds=2.0)) as checker,
        pytest.raises(GuardError, match="failed on 5 of 5 answers"),
    ):
        correct(checker, *[("#### 7", unreadable_gold)] * 50)


def test_a_completion_that_is_not_mathematics_is_wrong_and_stops_nothing() -> None:
    with closing(AnswerChecker(seconds=2.0)) as checker:
        assert correct(checker, *[(r"#### \frac{1}{", "7")] * 8) == [False] * 8
        assert checker.counts == GradeCounts(graded=8, unreadable=8)


def test_a_completion_without_an_answer_is_wrong_and_no_failure_of_the_checker() -> None:
    with closing(AnswerChecker()) as checker:
        assert correct(checker, ("no idea", "7")) == [False]
        assert checker.counts == GradeCounts(graded=1)


def test_plain_numbers_start_no_child() -> None:
    with closing(AnswerChecker()) as checker:
        before = _children()
        assert correct(checker, ("#### 7", "7.0"), ("it is 1,000", "1000")) == [True, True]
        assert _children() == before


def test_files_in_the_working_directory_do_not_stand_in_for_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sympy.py").write_text("raise RuntimeError('not the library')")
    monkeypatch.chdir(tmp_path)
    with closing(AnswerChecker()) as checker:
        assert correct(checker, (r"#### \frac{2+2}{2}", "2")) == [True]


def test_a_child_that_cannot_start_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with closing(AnswerChecker()) as checker, pytest.raises(GuardError, match="the answer checker cannot run"):
        correct(checker, (r"#### \frac{2+2}{2}", "2"))


def test_a_checker_works_in_a_thread(checker: AnswerChecker) -> None:
    grades: list[bool] = []
    work = threading.Thread(target=lambda: grades.extend(correct(checker, (r"#### \frac{2+2}{2}", "2"))))
    work.start()
    work.join()
    assert grades == [True]


@given(st.text(max_size=300), st.text(max_size=50))
@settings(max_examples=200, deadline=None)
def test_extracting_and_comparing_never_fail_on_any_text(text: str, gold: str) -> None:
    find_answer(text, form_of(gold))
    grade_exactly(text, gold)


@given(st.integers(-(10**12), 10**12))
@settings(deadline=None)
def test_a_whole_number_is_recognised_however_it_is_written(number: int) -> None:
    for written in (str(number), f"{number:,}", f"{number}.0", f"${number}", f"{number} kg", f"{number}%"):
        assert grade_exactly(written, str(number)) is True
        assert grade_exactly(written, str(number + 1)) is False


@given(st.text(alphabet="x1{}\\ ", max_size=12).filter(lambda text: _balanced(text) and text.strip() == text != ""))
def test_what_stands_in_a_box_comes_out_again(inside: str) -> None:
    assert marked_answer(f"so \\boxed{{{inside}}} it is") == inside


def _balanced(text: str) -> bool:
    depth = 0
    plain = text.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
    for character in plain:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0 and not plain.endswith("\\")


@given(st.text(max_size=60))
def test_writing_as_latex_twice_changes_nothing_more(text: str) -> None:
    once = as_latex(as_latex(text))
    assert once == as_latex(once)


@given(answer=st.text(alphabet="0123456789+-*/^(){}\\fracsqrtx ,=!", min_size=1, max_size=30))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mathematical_looking_text_gets_a_grade(checker: AnswerChecker, answer: str) -> None:
    assert correct(checker, (f"\\boxed{{{answer}}}", r"\sqrt{7}")) in ([True], [False])
