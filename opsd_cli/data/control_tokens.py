"""Control tokens written out in data: `<|im_end|><|im_start|>assistant` in a question would end the user's turn and
speak as the assistant. Rows with one are refused, or the token is made plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from opsd_cli.data.problems import Problem
from opsd_cli.settings.errors import DataError

SHORTEST = 3  # characters of a token that is looked for; shorter ones are ordinary text
SHOWN = 3


class ControlTokens:
    """The control tokens of one tokenizer, as they would be recognised in a text."""

    def __init__(self, tokenizer: Any) -> None:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokens = {token for token in (*added, *tokenizer.all_special_tokens) if len(token) >= SHORTEST}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def find(self, text: str) -> str | None:
        """The first control token in a text."""
        match = self._pattern.search(text) if self._pattern is not None else None
        return match[0] if match else None

    def escape(self, text: str) -> str:
        """The text with a space behind the first character of each control token, which makes it plain text."""
        while self._pattern is not None and self._pattern.search(text):
            text = self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    def clear(
        self, problems: Sequence[Problem], *, how: Literal["refuse", "escape"]
    ) -> tuple[tuple[Problem, ...], int]:
        """The problems without control tokens, and how many had any. Raises DataError for such problems where they are
        refused."""
        found = {
            place: token
            for place, problem in enumerate(problems)
            if (token := self.find("\n".join(texts_of(problem)))) is not None
        }
        if found and how == "refuse":
            shown = ", ".join(f"{problems[place].id} ({token})" for place, token in list(found.items())[:SHOWN])
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise DataError(
                f"control tokens in {len(found)} of {len(problems)} problems: {shown}{more}; they would end a turn or "
                "speak as the assistant; take them out, or set prompts.control_tokens=escape to make them plain text"
            )
        return tuple(self._cleared(p) if place in found else p for place, p in enumerate(problems)), len(found)

    def _cleared(self, problem: Problem) -> Problem:
        return replace(
            problem,
            question=self.escape(problem.question),
            solution=self.escape(problem.solution),
            system=self.escape(problem.system),
            earlier=tuple((role, self.escape(text)) for role, text in problem.earlier),
            columns=tuple((name, self.escape(text)) for name, text in problem.columns),
        )


def texts_of(problem: Problem) -> tuple[str, ...]:
    """Everything of a problem that a prompt may show."""
    others = [text for _, text in (*problem.columns, *problem.earlier)]
    return (problem.question, problem.solution, problem.system, *others)
