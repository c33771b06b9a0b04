"""Problems, templates and settings for the tests of prompts, and a fixture that makes renderers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import opsd_cli
from opsd_cli.data.contexts import Context
from opsd_cli.data.problems import Problem
from opsd_cli.data.prompts import PromptRenderer
from opsd_cli.settings.config import ContextSettings, PromptSettings

TINY = Path(opsd_cli.__file__).parent / "assets" / "tiny"

STUDENT = "{{question}}\n\n{{instruction}}"
TEACHER = "{{question}}\n\nReference solution:\n{{solution}}\n\nIn your own words.\n\n{{instruction}}"

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
THINKING = (
    TURNS
    + "{% if add_generation_prompt %}<|assistant|>"
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
DROPS_SYSTEM = TURNS.replace("%}<|", "%}{% if m.role != 'system' %}<|").replace("\n{%", "\n{% endif %}{%")

SHORT = Problem("p1", "What is one and one?", "One and one is 2.\n#### 2", "2")
LONG = Problem(
    "p2", "What is two and two?", "\n".join(f"Step {i} changes nothing." for i in range(60)) + "\n#### 4", "4"
)

MakeRenderer = Callable[..., PromptRenderer]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def prompt_settings(**changes: Any) -> PromptSettings:
    values: dict[str, Any] = {
        "system": None,
        "max_tokens": 300,
        "overflow": "drop",
        "max_dropped_share": 1.0,
        "student_thinking": False,
        "teacher_thinking": False,
        "allow_different_endings": False,
        "control_tokens": "refuse",
        "date": None,
        "student_variables": (),
        "teacher_variables": (),
    }
    return PromptSettings(**{**values, **changes})


def with_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer, with another chat template if there is one."""
    used = copy.deepcopy(tokenizer)
    used.chat_template = template or tokenizer.chat_template
    return used


@pytest.fixture
def make(tokenizer: Any) -> Iterator[MakeRenderer]:
    """Makes renderers of the tiny tokenizer and closes them."""
    made: list[PromptRenderer] = []

    def renderer(
        *,
        teacher: str = TEACHER,
        teacher_system: str | None = None,
        template: str | None = None,
        instruction: str = "",
        other: Any = "none",
        **changes: Any,
    ) -> PromptRenderer:
        context = Context(
            ContextSettings(
                name="solution",
                student=STUDENT,
                teacher=teacher,
                teacher_system=teacher_system,
                control="none",
                for_both=(),
                sibling="correct",
                verdicts="reference",
                write=None,
                write_tokens=9,
            )
        )
        made.append(
            PromptRenderer(
                with_template(tokenizer, template),
                settings=prompt_settings(**changes),
                context=context,
                instruction=instruction,
                other=other,
            )
        )
        return made[-1]

    yield renderer
    for one in made:
        one.close()
