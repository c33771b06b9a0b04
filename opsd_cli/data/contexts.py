"""What each role is shown, as text: the context templates of a run, checked and filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from opsd_cli.data.privileged import CONTROLS, PARTS_OF_SOLUTION, Privileged, feedback_of, partners
from opsd_cli.data.problems import Problem, Rollout
from opsd_cli.data.templates import (
    PRIVILEGED,
    SAMPLED,
    WRITTEN,
    Role,
    Template,
    in_braces,
    parse_template,
    template_problems,
)
from opsd_cli.settings.config import ContextSettings
from opsd_cli.settings.errors import ConfigError

Other = Literal["none", "free", "wrong", "reference_only"]
"""A third prompt, for targets made of two passes: the teacher's without any reference, with another problem's,
or with the reference and no problem."""


def check_context(settings: ContextSettings, *, other: Other = "none") -> list[str]:
    """Everything that is wrong with a context, and with `target.other` beside it, one line each."""
    try:
        Context(settings).check_other(other)
    except ConfigError as error:
        return list(error.problems)
    return []


class Context:
    """The templates and the control of one run. Raises ConfigError for templates that cannot be used."""

    def __init__(self, settings: ContextSettings) -> None:
        texts: dict[Role, str] = {"student": settings.student, "teacher": settings.teacher}
        if settings.teacher_system is not None:
            texts["teacher_system"] = settings.teacher_system
        templates = {role: parse_template(text) for role, text in texts.items()}
        problems = [problem for role, template in templates.items() for problem in template_problems(template, role)]
        if problems:
            raise ConfigError(*problems)
        self.name = settings.name
        self.control = settings.control
        self.student = templates["student"]
        self.teacher = templates["teacher"]
        self.teacher_system: Template | None = templates.get("teacher_system")
        self._check_control()

    @property
    def teacher_placeholders(self) -> set[str]:
        """Those of the teacher's two messages."""
        system = set() if self.teacher_system is None else self.teacher_system.placeholders
        return self.teacher.placeholders | system

    @property
    def is_sampled(self) -> bool:
        """Whether the teacher's prompt is made of a step's rollouts, and can only be made after them."""
        return not self.teacher_placeholders.isdisjoint(SAMPLED)

    def privileged(self, problems: Sequence[Problem], *, seed: int) -> list[Privileged]:
        """What the teacher of each problem is shown before anything is sampled: its own solution, or what the
        control puts in its place. A function of the problems, their order and `seed`. Raises DataError when a
        control needs a second problem and there is none."""
        return CONTROLS[self.control](problems, seed)

    def other_privileged(self, shown: Sequence[Privileged], other: Other, *, seed: int) -> list[Privileged]:
        """What the third prompt of each problem is shown, where its teacher is shown `shown`: another problem's for
        `wrong`, else the same. Raises DataError when `wrong` has no second problem."""
        return [shown[i] for i in partners(len(shown), seed)] if other == "wrong" else list(shown)

    def privileged_of(
        self, rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]
    ) -> list[Privileged | None]:
        """What the teacher of each rollout is shown once all are sampled and graded; None where that is
        nothing. `texts` are the completions without control tokens."""
        held = self.teacher_placeholders
        each = feedback_of(rollouts, correct, texts, wanted=held)
        names = held.intersection(PRIVILEGED)
        return [shown if any(asdict(shown)[name] for name in names) else None for shown in each]

    def student_text(self, problem: Problem, *, instruction: str) -> str:
        """The student's message."""
        return self.student.fill({"question": problem.question, "instruction": instruction})

    def teacher_text(self, problem: Problem, *, instruction: str, shown: Privileged) -> str:
        """The teacher's message, with `shown` as its privileged context."""
        return self.teacher.fill(_values(problem, instruction, shown))

    def system_text(self, problem: Problem, *, instruction: str, shown: Privileged) -> str | None:
        """The system message that the teacher alone has, if there is one."""
        if self.teacher_system is None:
            return None
        return self.teacher_system.fill(_values(problem, instruction, shown)) or None

    def check_other(self, other: Other) -> None:
        """Raises ConfigError where a third prompt would not differ from the teacher's as its name says."""
        reason = self._why_not(other)
        if reason is not None:
            raise ConfigError(f"target.other={other} {reason}; choose another context, or target=teacher")

    def _why_not(self, other: Other) -> str | None:
        named, control = f"context={self.name}", f"context.control={self.control}"
        if other == "free" and self.teacher == self.student and self.teacher_system is None:
            return f"removes something that {named} never shows, so both passes would be identical"
        if other == "wrong" and self.is_sampled:
            return f"shows another problem's solution, and {named} is made of rollouts"
        if other == "wrong" and self.teacher_placeholders.isdisjoint(WRITTEN):
            return f"needs {in_braces(WRITTEN, ' or ')} in context.teacher, and {named} has none there"
        if other == "wrong" and self.control in ("shuffled", "wrong"):
            return f"needs a correct solution to compare with, and {control} shows a wrong one"
        if other == "reference_only" and self.teacher_placeholders.isdisjoint(PRIVILEGED):
            return f"shows the reference without the problem, and {named} has no reference"
        return None

    def _check_control(self) -> None:
        if self.control == "none":
            return
        if self.is_sampled:
            raise ConfigError(
                f"context.control={self.control} stands in for a written solution, and context={self.name} is made of "
                "rollouts; set context.control=none"
            )
        wanted = ("solution",) if self.control in PARTS_OF_SOLUTION else WRITTEN
        if self.teacher_placeholders.isdisjoint(wanted):
            raise ConfigError(
                f"context.control={self.control} needs {in_braces(wanted, ' or ')} in context.teacher, and "
                f"context={self.name} has none there"
            )


def _values(problem: Problem, instruction: str, shown: Privileged) -> dict[str, str]:
    return {"question": problem.question, "instruction": instruction, **asdict(shown)}
