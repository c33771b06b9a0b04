"""Context templates: literal text with placeholders, in paragraphs, and which placeholders each role may have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from opsd_cli.settings.registry import did_you_mean

Role = Literal["student", "teacher", "teacher_system"]
"""A template of ContextSettings: the user message of a role, or the teacher's own system message."""

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
        """The text. Values go in as they are and are never searched for placeholders. A paragraph whose placeholders
        are all empty disappears, with the words around them."""
        paragraphs = []
        for parts in self.paragraphs:
            names = parts[1::2]
            if any(values[name].strip() for name in names) if names else parts[0].strip():
                paragraphs.append("".join(values[part] if i % 2 else part for i, part in enumerate(parts)))
        return "\n\n".join(paragraphs)


def parse_template(text: str) -> Template:
    """The paragraphs of a text, split at blank lines, each split at its placeholders."""
    paragraphs = BLANK_LINES.split(text.strip())
    return Template(tuple(tuple(PLACEHOLDER.split(paragraph)) for paragraph in paragraphs))


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
