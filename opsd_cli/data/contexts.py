"""What each role is shown, as text: the context templates of a run (literal text with placeholders, in paragraphs),
checked and filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from opsd_cli.data.privileged import PARTS_OF_SOLUTION, Privileged, feedback_of, shown_under
from opsd_cli.data.problems import Problem, Rollout
from opsd_cli.settings.config import ContextSettings
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import did_you_mean

Role = Literal["student", "teacher", "teacher_system"]
"""A template of ContextSettings: the user message of a role, or the teacher's own system message."""

Other = Literal["none", "free", "wrong", "reference_only", "view"]
"""A third prompt, for targets made of two passes: the teacher's without any reference, with another problem's, with the
reference and no problem, or in other words (`target.view`)."""

PUBLIC = ("question", "instruction")
WRITTEN = ("solution", "answer")  # from the dataset
SAMPLED = ("sibling", "feedback")  # from the rollouts of a step
PRIVILEGED = (*WRITTEN, *SAMPLED)

PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True)
class Template:
    """Paragraphs of literal text and placeholder names, alternating: odd parts are names."""

    paragraphs: tuple[tuple[str, ...], ...]

    @staticmethod
    def parse(text: str) -> Template:
        """Split at blank lines, and each paragraph at its placeholders."""
        return Template(tuple(tuple(PLACEHOLDER.split(part)) for part in BLANK_LINES.split(text.strip())))

    @property
    def placeholders(self) -> set[str]:
        return {name for parts in self.paragraphs for name in parts[1::2]}

    def fill(self, values: Mapping[str, str]) -> str:
        """The text. Values go in as they are and are never searched for placeholders. A paragraph whose placeholders
        are all empty disappears, with the words around them."""
        paragraphs = []
        for parts in self.paragraphs:
            names = parts[1::2]
            if any(values[name].strip() for name in names) if names else parts[0].strip():
                paragraphs.append("".join(values[part] if i % 2 else part for i, part in enumerate(parts)))
        return "\n\n".join(paragraphs)


def template_problems(template: Template, role: Role) -> list[str]:
    """Unknown placeholders, those that the student must not have, and a user message without the question."""
    known = (*PUBLIC, *PRIVILEGED)
    allowed = in_braces(PUBLIC if role == "student" else known, " ")
    problems = [
        f"context.{role}: unknown placeholder {{{{{name}}}}}{did_you_mean(name, known)} (allowed: {allowed})"
        for name in sorted(template.placeholders - set(known))
    ]
    if role == "student":
        problems += [
            f"context.student holds {{{{{name}}}}}, which only the teacher may see (allowed: {allowed})"
            for name in PRIVILEGED
            if name in template.placeholders
        ]
    if role != "teacher_system" and "question" not in template.placeholders:
        problems.append(f"context.{role} does not show {{{{question}}}}")
    return problems


def in_braces(names: Sequence[str], between: str) -> str:
    """Placeholders as they are written in a template, in a list."""
    return between.join("{{" + name + "}}" for name in names)


def check_context(settings: ContextSettings, *, other: Other = "none", view: str | None = None) -> list[str]:
    """Everything that is wrong with a context, and with `target.other` and `target.view` beside it, one line each."""
    try:
        context = Context(settings)
        context.check_other(other)
    except ConfigError as error:
        return list(error.problems)
    try:
        second = second_view(settings, view)
    except ConfigError as error:
        return [problem.replace("context.teacher", "target.view") for problem in error.problems]
    if second is None:
        return []
    missing = second.teacher_placeholders.intersection(SAMPLED) - context.teacher_placeholders
    unmade = [f"target.view shows {in_braces([name], '')}, which context.teacher must show too" for name in missing]
    same = second.teacher == context.teacher
    return unmade + (["target.view is context.teacher itself; write what else a teacher may see"] if same else [])


def second_view(settings: ContextSettings, view: str | None) -> Context | None:
    """The context whose teacher is shown `view`; None where there is none. Raises ConfigError for a text that no
    teacher's message can be, in the words of `context.teacher`."""
    return None if view is None else Context(replace(settings, teacher=view))


class Context:
    """The templates and the control of one run. Raises ConfigError for templates that cannot be used."""

    def __init__(self, settings: ContextSettings) -> None:
        texts: dict[Role, str] = {"student": settings.student, "teacher": settings.teacher}
        if settings.teacher_system is not None:
            texts["teacher_system"] = settings.teacher_system
        templates = {role: Template.parse(text) for role, text in texts.items()}
        if problems := [fault for role, template in templates.items() for fault in template_problems(template, role)]:
            raise ConfigError(*problems)
        self.name, self.control = settings.name, settings.control
        self.student, self.teacher = templates["student"], templates["teacher"]
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
        """What the teacher of each problem is shown before anything is sampled, by the run's control."""
        return shown_under(self.control, problems, seed)

    def privileged_of(
        self, rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]
    ) -> list[Privileged | None]:
        """What the teacher of each rollout is shown once all are sampled and graded; None where that is nothing."""
        each = feedback_of(rollouts, correct, texts, wanted=self.teacher_placeholders)
        names = self.teacher_placeholders.intersection(PRIVILEGED)
        return [shown if any(asdict(shown)[name] for name in names) else None for shown in each]

    def student_text(self, problem: Problem, *, instruction: str) -> str:
        return self.student.fill({"question": problem.question, "instruction": instruction})

    def teacher_text(self, problem: Problem, *, instruction: str, shown: Privileged) -> str:
        return self.teacher.fill(_values(problem, instruction, shown))

    def system_text(self, problem: Problem, *, instruction: str, shown: Privileged) -> str | None:
        """The system message that the teacher alone has, if there is one."""
        if self.teacher_system is None:
            return None
        return self.teacher_system.fill(_values(problem, instruction, shown)) or None

    def check_other(self, other: Other) -> None:
        """Raises ConfigError where a third prompt would not differ from the teacher's as its name says."""
        named, held, reason = f"context={self.name}", self.teacher_placeholders, ""
        if other == "free" and self.teacher == self.student and self.teacher_system is None:
            reason = f"removes something that {named} never shows, so both passes would be identical"
        elif other == "wrong" and self.is_sampled:
            reason = f"shows another problem's solution, and {named} is made of rollouts"
        elif other == "wrong" and held.isdisjoint(WRITTEN):
            reason = f"needs {in_braces(WRITTEN, ' or ')} in context.teacher, and {named} has none there"
        elif other == "wrong" and self.control in ("shuffled", "wrong"):
            reason = f"needs a correct solution to compare with, and context.control={self.control} shows a wrong one"
        elif other == "reference_only" and held.isdisjoint(PRIVILEGED):
            reason = f"shows the reference without the problem, and {named} has no reference"
        if reason:
            raise ConfigError(f"target.other={other} {reason}; choose another context, or target=teacher")

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
