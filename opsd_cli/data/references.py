"""The references of a dataset, graded like completions before anything is trained: where a solution is not graded right
against its own answer, no completion in its style would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsd_cli.data.answer_forms import form_of
from opsd_cli.data.answers import AnswerChecker, grade_plainly
from opsd_cli.data.graders import Grades
from opsd_cli.data.problems import Problem
from opsd_cli.data.stated_answers import find_answer

MOST_ASKED = 100  # references that only mathematics can grade, which takes a few milliseconds each
ENOUGH_SHARE = 0.95
SHOWN = 3
SHOWN_CHARS = 60


@dataclass(frozen=True)
class ReferenceReport:
    """How many references are graded right against their own answer, and some that are not."""

    graded: int
    right: int
    wrong: tuple[tuple[str, str, str | None], ...]  # id, answer, what the solution states (None: nothing)

    def __str__(self) -> str:
        return f"references: {self.right} of {self.graded} are graded right against their own answer"

    @property
    def warning(self) -> str | None:
        """What to tell where too many are not."""
        if not self.graded or self.right >= ENOUGH_SHARE * self.graded:
            return None
        examples = "; ".join(
            f"{name}: answer {answer[:SHOWN_CHARS]!r}, the solution "
            + ("states none" if stated is None else f"states {stated[:SHOWN_CHARS]!r}")
            for name, answer, stated in self.wrong
        )
        return (
            f"only {self.right} of {self.graded} reference solutions ({self.right / self.graded:.0%}) are graded right "
            f"against their own answers, so accuracy may mean little: {examples}. Look at dataset.answer_field and "
            "dataset.solution_field; a solution that ends in `#### ANSWER` or \\boxed{ANSWER} is always understood"
        )


def check_references(checker: Grades, problems: Sequence[Problem]) -> ReferenceReport:
    """Grade each problem's solution as if a model had written it. Of those that need mathematics the first MOST_ASKED
    are graded, the others left out. A grader of the user's own is not asked."""
    if not isinstance(checker, AnswerChecker):
        return ReferenceReport(0, 0, ())  # a grader of the user's own need not take a reference for an answer
    graded = right = asked = 0
    wrong: list[tuple[str, str, str | None]] = []
    for problem in problems:
        if problem.answer is None or not problem.solution:
            continue
        grade, undecided = grade_plainly(problem.solution, problem.accepted)
        if undecided:
            asked += 1
            if asked > MOST_ASKED:
                continue
            with checker.on_trial():
                (grade,) = checker.grade([(problem.solution, problem.accepted)])
        graded += 1
        right += grade.correct
        if not grade.correct and len(wrong) < SHOWN:
            wrong.append((problem.id, problem.answer, find_answer(problem.solution, form_of(problem.answer))))
    return ReferenceReport(graded, right, tuple(wrong))
