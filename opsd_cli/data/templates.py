"""Context templates: literal text with placeholders, in paragraphs. Owns which placeholders there are, which
role may have which, and how a text is made of them. Knows no problems and no chat format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import did_you_mean

Role = Literal["student", "teacher", "teacher_system"]
"""A template of ContextSettings: the user message of a role, or the system message that the teacher alone has."""

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

    @property
    def placeholders(self) -> set[str]:
        return {name for parts in self.paragraphs for name in parts[1::2]}

    def fill(self, values: Mapping[str, str]) -> str:
        """The text. Values go in as they are and are never looked at for placeholders. A paragraph whose
        placeholders are all empty disappears, with the words around them."""
        shown = [parts for parts in self.paragraphs if _has_something(parts, values)]
        return "\n\n".join("".join(_filled(parts, values)) for parts in shown)


def _has_something(parts: Sequence[str], values: Mapping[str, str]) -> bool:
    names = parts[1::2]
    return any(values[name].strip() for name in names) if names else bool(parts[0].strip())


def _filled(parts: Sequence[str], values: Mapping[str, str]) -> list[str]:
    return [values[part] if position % 2 else part for position, part in enumerate(parts)]


def parse_template(text: str, role: Role) -> Template:
    """The template of one role. Raises ConfigError for an unknown placeholder, for one the student must not
    have, and when a user message does not show the question."""
    paragraphs = BLANK_LINES.split(text.strip())
    template = Template(tuple(tuple(PLACEHOLDER.split(paragraph)) for paragraph in paragraphs))
    known = (*PUBLIC, *PRIVILEGED)
    listed = in_braces(PUBLIC if role == "student" else known, " ")
    problems = [
        f"context.{role}: unknown placeholder {{{{{name}}}}}{did_you_mean(name, known)} (allowed: {listed})"
        for name in sorted(template.placeholders - set(known))
    ]
    if role == "student":
        problems += [
            f"context.student holds {{{{{name}}}}}, which only the teacher may see (allowed: {listed})"
            for name in PRIVILEGED
            if name in template.placeholders
        ]
    if role != "teacher_system" and "question" not in template.placeholders:
        problems.append(f"context.{role} does not show {{{{question}}}}")
    if problems:
        raise ConfigError(*problems)
    return template


def parse_templates(texts: Mapping[Role, str]) -> dict[Role, Template]:
    """The template of each role. Raises ConfigError with the problems of all of them."""
    templates: dict[Role, Template] = {}
    problems: list[str] = []
    for role, text in texts.items():
        try:
            templates[role] = parse_template(text, role)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return templates


def in_braces(names: Sequence[str], between: str) -> str:
    """Placeholders as they are written in a template, in a list."""
    return between.join("{{" + name + "}}" for name in names)
