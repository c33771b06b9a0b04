"""What each role is shown, as text: the context templates of a run (literal text with placeholders, in paragraphs),
checked and filled in."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from opsd_cli.data.privileged import PARTS_OF_SOLUTION, ROW, Privileged, feedback_of, majority_of, shown_under
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
SAMPLED = ("sibling", "feedback", "written")  # from the rollouts of a step
PRIVILEGED = (*WRITTEN, *SAMPLED)

ATTEMPT = "attempt"  # the rollout itself: only in what the policy is asked
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


def template_problems(template: Template, role: Role, *, for_both: Collection[str] = ()) -> list[str]:
    """Unknown placeholders, those that the student must not have, and a user message without the question. The student
    may see the columns `for_both`."""
    known = (*PUBLIC, *PRIVILEGED)
    shared = [f"{ROW}{name}" for name in for_both]
    allowed = in_braces((*PUBLIC, *shared) if role == "student" else (*known, f"{ROW}COLUMN"), " ")
    fixed = {name for name in template.placeholders if not name.startswith(ROW)}
    problems = [
        f"context.{role}: unknown placeholder {{{{{name}}}}}{did_you_mean(name, known)} (allowed: {allowed}; a "
        f"column of the data is written {{{{{ROW}COLUMN}}}})"
        for name in sorted(fixed - set(known))
    ]
    if role == "student":
        columns = sorted(template.placeholders - fixed - set(shared))
        for name in (*PRIVILEGED, *columns):
            way_out = f"; to show it to both, context.for_both=[{name.removeprefix(ROW)}]" if name in columns else ""
            if name in template.placeholders:
                why = f"which only the teacher may see (allowed: {allowed}){way_out}"
                problems.append(f"context.student holds {{{{{name}}}}}, {why}")
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
        both = settings.for_both
        faults = [template_problems(template, role, for_both=both) for role, template in templates.items()]
        if problems := [fault for some in faults for fault in some]:
            raise ConfigError(*problems)
        self.name, self.control = settings.name, settings.control
        self.sibling, self.verdicts, self.for_both = settings.sibling, settings.verdicts, frozenset(settings.for_both)
        self.student, self.teacher = templates["student"], templates["teacher"]
        self.teacher_system: Template | None = templates.get("teacher_system")
        self.write = None if settings.write is None else Template.parse(settings.write)
        self._check_control()
        self._check_verdicts()
        self._check_write()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that either role is shown."""
        asked = set() if self.write is None else self.write.placeholders
        shown = self.student.placeholders | self.teacher_placeholders | asked
        return tuple(sorted(name.removeprefix(ROW) for name in shown if name.startswith(ROW)))

    @property
    def _own_columns(self) -> set[str]:
        """The placeholders of columns that only the teacher is shown."""
        return {f"{ROW}{name}" for name in self.columns if name not in self.for_both} & self.teacher_placeholders

    @property
    def needs_answers(self) -> bool:
        """Whether the teacher is shown something that only a reference answer can tell."""
        held = self.teacher_placeholders | (set() if self.write is None else self.write.placeholders)
        by_reference = self.verdicts == "reference" and self.sibling in ("correct", "shortest", "longest")
        return ("sibling" in held and by_reference) or ("feedback" in held and self.verdicts == "reference")

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
        self, rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str], written: Sequence[str] = ()
    ) -> list[Privileged | None]:
        """What the teacher of each rollout is shown once all are sampled and graded, and `written` about; None where
        that is nothing."""
        each = feedback_of(rollouts, correct, texts, wanted=self.teacher_placeholders, sibling=self.sibling)
        each = [replace(shown, written=text) for shown, text in zip(each, written or [""] * len(each), strict=True)]
        names = self.teacher_placeholders.intersection(PRIVILEGED) | self._own_columns
        return [shown if any(shown.values[name] for name in names) else None for shown in each]

    def requests(self, rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]) -> list[str]:
        """The message that asks the policy to write about each rollout. Only where it is asked."""
        assert self.write is not None, "nothing is written in this context"
        each = feedback_of(rollouts, correct, texts, wanted=self.write.placeholders, sibling=self.sibling)
        return [
            self.write.fill(shown.values | self._public(rollout.prompt.problem, "") | {ATTEMPT: text})
            for rollout, shown, text in zip(rollouts, each, texts, strict=True)
        ]

    def verdicts_on(self, rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]) -> list[bool]:
        """Which rollouts count as right for the context and for tokens.keep, given what the grader says."""
        if self.verdicts == "majority":
            return majority_of(rollouts, texts)
        return [True] * len(rollouts) if self.verdicts == "none" else list(correct)

    def student_text(self, problem: Problem, *, instruction: str) -> str:
        return self.student.fill(self._public(problem, instruction))

    def teacher_text(self, problem: Problem, *, instruction: str, shown: Privileged) -> str:
        return self.teacher.fill(shown.values | self._public(problem, instruction))

    def system_text(self, problem: Problem, *, instruction: str, shown: Privileged) -> str | None:
        """The system message that the teacher alone has, if there is one."""
        if self.teacher_system is None:
            return None
        return self.teacher_system.fill(shown.values | self._public(problem, instruction)) or None

    def _public(self, problem: Problem, instruction: str) -> dict[str, str]:
        """What both roles may be shown of a problem."""
        own = {f"{ROW}{name}": text for name, text in problem.columns if name in self.for_both}
        return {"question": problem.question, "instruction": instruction, **own}

    def check_other(self, other: Other) -> None:
        """Raises ConfigError where a third prompt would not differ from the teacher's as its name says."""
        named, held, reason = f"context={self.name}", self.teacher_placeholders, ""
        if other == "free" and self.teacher == self.student and self.teacher_system is None:
            reason = f"removes something that {named} never shows, so both passes would be identical"
        elif other == "wrong" and self.is_sampled:
            reason = f"shows another problem's solution, and {named} is made of rollouts"
        elif other == "wrong" and held.isdisjoint(WRITTEN) and not self._own_columns:
            reason = f"needs {in_braces(WRITTEN, ' or ')} in context.teacher, and {named} has none there"
        elif other == "wrong" and self.control in ("shuffled", "wrong"):
            reason = f"needs a correct solution to compare with, and context.control={self.control} shows a wrong one"
        elif other == "reference_only" and held.isdisjoint(PRIVILEGED) and not self._own_columns:
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
        if self._own_columns and self.control != "shuffled":
            raise ConfigError(
                f"context.control={self.control} changes the solution, and context={self.name} would still show "
                f"{in_braces(sorted(self._own_columns), ' ')} as written; use context.control=shuffled, which shows "
                "another problem's"
            )
        wanted = ("solution",) if self.control in PARTS_OF_SOLUTION else WRITTEN
        if self.teacher_placeholders.isdisjoint(wanted) and not self._own_columns:
            raise ConfigError(
                f"context.control={self.control} needs {in_braces(wanted, ' or ')} in context.teacher, and "
                f"context={self.name} has none there"
            )

    def _check_verdicts(self) -> None:
        held = self.teacher_placeholders | (set() if self.write is None else self.write.placeholders)
        if self.verdicts == "none" and "feedback" in held:
            raise ConfigError(
                f"context={self.name} says in {{{{feedback}}}} what is wrong, which context.verdicts=none cannot tell; "
                "use reference or majority"
            )
        if self.sibling != "correct" and "sibling" not in held:
            raise ConfigError(
                f"context.sibling={self.sibling} chooses a rollout for {{{{sibling}}}}, and context={self.name} shows "
                "none"
            )

    def _check_write(self) -> None:
        asked = set() if self.write is None else self.write.placeholders
        if (self.write is None) is ("written" in self.teacher_placeholders):
            raise ConfigError(
                f"context={self.name}: context.write asks for a text and {{{{written}}}} in context.teacher shows it; "
                "set both, or neither"
            )
        known = {"question", "solution", "answer", "sibling", "feedback", ATTEMPT}
        if unknown := sorted(name for name in asked - known if not name.startswith(ROW)):
            raise ConfigError(
                f"context.write: unknown placeholder {{{{{unknown[0]}}}}}{did_you_mean(unknown[0], known)} (allowed: "
                f"{in_braces((*sorted(known), ROW + 'COLUMN'), ' ')})"
            )
