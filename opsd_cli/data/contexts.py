"""What each role is shown, as text. Owns the context templates (literal replacement of four placeholders,
paragraphs that are empty disappear) and the controls: what a teacher sees in place of its problem's own
solution. Chat templates and token ids are `prompts`' business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from opsd_cli.data.answers import marked_answer
from opsd_cli.data.problems import Problem
from opsd_cli.settings.config import ContextSettings
from opsd_cli.settings.errors import ConfigError, DataError
from opsd_cli.settings.registry import did_you_mean

Role = Literal["student", "teacher"]

PUBLIC = ("question", "instruction")
WRITTEN = ("solution", "answer")  # from the dataset
SAMPLED = ("sibling", "feedback")  # from the rollouts of a step
PRIVILEGED = (*WRITTEN, *SAMPLED)

PARTS_OF_SOLUTION = ("first_step", "all_but_last")
"""Controls that show some lines of the solution, and withhold the answer."""

PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
WHOLE_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3}){1,5}|-?\d{1,18}")


@dataclass(frozen=True)
class Privileged:
    """What only the teacher is shown about one problem."""

    solution: str
    answer: str
    sibling: str = ""  # a correct completion of the same problem
    feedback: str = ""  # what a verifier says of the rollout's own attempt


@dataclass(frozen=True)
class Template:
    """Paragraphs of literal text and placeholder names, alternating: odd parts are names."""

    paragraphs: tuple[tuple[str, ...], ...]

    @property
    def placeholders(self) -> set[str]:
        return {name for parts in self.paragraphs for name in parts[1::2]}

    def fill(self, values: Mapping[str, str]) -> str:
        """The text. Values go in as they are and are never looked at for placeholders. A paragraph about something
        sampled disappears where there is none."""
        shown = [parts for parts in self.paragraphs if all(values[n] for n in parts[1::2] if n in SAMPLED)]
        filled = ("".join(_filled(parts, values)) for parts in shown)
        return "\n\n".join(paragraph for paragraph in filled if paragraph.strip())


def _filled(parts: Sequence[str], values: Mapping[str, str]) -> list[str]:
    return [values[part] if position % 2 else part for position, part in enumerate(parts)]


def parse_template(text: str, role: Role, *, key: str | None = None) -> Template:
    """The template of one role (`key`: of its system message, which need not show the question). Raises ConfigError
    for an unknown placeholder, for one the student must not have, and when the question is not shown."""
    paragraphs = BLANK_LINES.split(text.strip())
    template = Template(tuple(tuple(PLACEHOLDER.split(paragraph)) for paragraph in paragraphs))
    known = (*PUBLIC, *PRIVILEGED)
    listed = " ".join("{{" + name + "}}" for name in (PUBLIC if role == "student" else known))
    problems = [
        f"context.{key or role}: unknown placeholder {{{{{name}}}}}{did_you_mean(name, known)} (allowed: {listed})"
        for name in sorted(template.placeholders - set(known))
    ]
    if role == "student":
        problems += [
            f"context.student holds {{{{{name}}}}}, which only the teacher may see (allowed: {listed})"
            for name in PRIVILEGED
            if name in template.placeholders
        ]
    if key is None and "question" not in template.placeholders:
        problems.append(f"context.{role} does not show {{{{question}}}}")
    if problems:
        raise ConfigError(*problems)
    return template


class Context:
    """The two templates and the control of one run. Raises ConfigError for templates that cannot be used."""

    def __init__(self, settings: ContextSettings) -> None:
        self.student = parse_template(settings.student, "student")
        self.teacher = parse_template(settings.teacher, "teacher")
        system = settings.teacher_system
        self.teacher_system = None if system is None else parse_template(system, "teacher", key="teacher_system")
        self.control = settings.control
        wanted = ("solution",) if self.control in PARTS_OF_SOLUTION else WRITTEN
        if self.control != "none" and self.teacher.placeholders.isdisjoint(wanted):
            missing = " or ".join("{{" + name + "}}" for name in wanted)
            raise ConfigError(
                f"context.control={self.control} needs {missing} in context.teacher, and context={settings.name} "
                "has none there"
            )

    @property
    def is_sampled(self) -> bool:
        """Whether the teacher's prompt is made of a step's rollouts, and can only be made after them."""
        system = set() if self.teacher_system is None else self.teacher_system.placeholders
        return not (self.teacher.placeholders | system).isdisjoint(SAMPLED)

    def privileged(self, problems: Sequence[Problem], *, seed: int) -> list[Privileged]:
        """What the teacher of each problem is shown: its own solution, or what the control puts in its place.
        A function of the problems, their order and `seed`. Raises DataError when there is nobody to swap
        with."""
        if self.control == "none":
            return [Privileged(problem.solution, problem.answer) for problem in problems]
        return CONTROLS[self.control](problems, seed)

    def student_text(self, problem: Problem, *, instruction: str) -> str:
        """The student's message."""
        return self.student.fill({"question": problem.question, "instruction": instruction})

    def teacher_text(self, problem: Problem, *, instruction: str, shown: Privileged) -> str:
        """The teacher's message, with `shown` as its privileged context."""
        return self.teacher.fill(self._values(problem.question, instruction, shown))

    def system_text(self, problem: Problem, *, instruction: str, shown: Privileged) -> str | None:
        """The system message that the teacher alone has, if there is one."""
        if self.teacher_system is None:
            return None
        return self.teacher_system.fill(self._values(problem.question, instruction, shown)) or None

    def _values(self, question: str, instruction: str, shown: Privileged) -> dict[str, str]:
        return {"question": question, "instruction": instruction, **vars(shown)}


def _partners(count: int, seed: int) -> list[int]:
    """A permutation in one cycle (Sattolo's algorithm): nobody is their own partner."""
    if count < 2:
        raise DataError("context.control needs at least two problems: a teacher must see another problem's solution")
    random = Random(f"context control {seed}")
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(random.random() * last)
        order[last], order[other] = order[other], order[last]
    return order


def _shuffled(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    partners = [problems[i] for i in _partners(len(problems), seed)]
    return [Privileged(partner.solution, partner.answer) for partner in partners]


def _first_step(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    return [Privileged(problem.solution.strip().split("\n")[0].strip(), "") for problem in problems]


def _all_but_last(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    return [Privileged("\n".join(_steps_and_closing(problem)[0]), "") for problem in problems]


def _wrong(problems: Sequence[Problem], seed: int) -> list[Privileged]:
    partners = _partners(len(problems), seed)
    return [_wrong_one(problem, problems[i], seed) for problem, i in zip(problems, partners, strict=True)]


def _wrong_one(problem: Problem, partner: Problem, seed: int) -> Privileged:
    """The solution with another final answer: a number is moved by 1 to 9, other answers become the
    partner's."""
    answer = problem.answer
    if WHOLE_NUMBER.fullmatch(answer):
        wrong = str(int(answer.replace(",", "")) + Random(f"wrong {seed} {problem.id}").randint(1, 9))
    else:
        wrong = partner.answer if partner.answer != answer else f"not {answer}"
    steps, closing = _steps_and_closing(problem)
    replaced = [_replace_answer(line, answer, wrong) for line in closing]
    if replaced == closing:
        replaced.append(f"The answer is {wrong}.")
    return Privileged("\n".join([*steps, *replaced]), wrong)


def _steps_and_closing(problem: Problem) -> tuple[list[str], list[str]]:
    """The lines of a solution before, and from, its closing: the marked line and the step before it that
    states the answer too, or without a mark the last line that does. No closing when the last line does not
    state the answer."""
    lines = [line for line in problem.solution.split("\n") if line.strip()]
    longest = 2 if marked_answer(lines[-1]) is not None else 1
    size = 0
    while size < min(longest, len(lines)) and _states(lines[-1 - size], problem.answer):
        size += 1
    return lines[: len(lines) - size], lines[len(lines) - size :]


def _states(line: str, answer: str) -> bool:
    return _replace_answer(line, answer, "") != line


def _replace_answer(line: str, answer: str, new: str) -> str:
    """`line` with every `answer` in it replaced, where it stands as a whole number or word."""
    digits = answer.replace(",", "")
    # 1080 is written 1,080 or 1080.
    pattern = r",?".join(map(re.escape, digits)) if digits.lstrip("-").isdigit() else re.escape(answer)
    return re.sub(rf"(?<![\w.,])(?:{pattern})(?![\w]|[.,]\d)", lambda _: new, line)


CONTROLS: dict[str, Callable[[Sequence[Problem], int], list[Privileged]]] = {
    "shuffled": _shuffled,
    "first_step": _first_step,
    "all_but_last": _all_but_last,
    "wrong": _wrong,
}
"""Control -> what each teacher is shown instead. `none` is the problem's own solution."""
