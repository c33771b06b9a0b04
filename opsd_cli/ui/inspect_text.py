"""`opsd inspect` on a terminal: both prompts, the completion in shades of red, and the tokens that carry most."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from opsd_cli.insight.samples import RolloutView, TokenView
from opsd_cli.safety.terminal import escape_controls, escape_line
from opsd_cli.ui.columns import aligned
from opsd_cli.ui.differences import Marked, differences
from opsd_cli.ui.theme import console_for, decimal, percent, plural

SHADES = ((0.05, ""), (0.3, "black on #fde2e2"), (1.0, "black on #f9b4b4"), (3.0, "black on #f17f7f"))
DARKEST = "#ffffff on #b91c1c"
MOST_TOKENS = 12  # in the table under a completion


def print_rollouts(looked: Sequence[Sequence[RolloutView]], *, against: str) -> None:
    """Print each rollout, and under it the same under the second teacher."""
    console = console_for(sys.stdout)
    for views in looked:
        first = views[0]
        _print_prompts(console, first)
        for view, words in zip(views, ("", against), strict=False):
            if view is not first:
                console.print(Text(f"\nagainst {words}", "label"))
                console.print(_prompt(differences(first.teacher_prompt, view.teacher_prompt)[1]), soft_wrap=True)
            _print_completion(console, view)
        console.print()


def _print_prompts(console: Console, view: RolloutView) -> None:
    student, teacher = differences(view.student_prompt, view.teacher_prompt)
    console.print(
        Text.assemble(
            ("problem ", "label"), escape_line(view.problem), ("  answer ", "label"), escape_line(view.answer or "-")
        )
    )
    for role, marked in (("student", student), ("teacher", teacher)):
        console.print(Text(f"\nwhat the {role} is shown", "label"))
        console.print(_prompt(marked), soft_wrap=True)


def _prompt(marked: Marked) -> Text:
    return Text.assemble(*((escape_controls(text), "value" if own else "") for text, own in marked))


def _print_completion(console: Console, view: RolloutView) -> None:
    verdict = "right" if view.correct else "wrong" if view.answer else "not graded"
    console.print(Text(f"\nwhat the student wrote ({verdict}, {plural(len(view.tokens), 'token')})", "label"))
    pieces = ((escape_controls(token.text), shade(token.loss)) for token in view.tokens)
    console.print(Text.assemble(*pieces), soft_wrap=True)
    shares = ", ".join(f"{kind} {percent(share)}" for kind, share in view.share_by_class.items())
    carried = f"{shares}; the first tenth carries {percent(view.first_tenth)}" if shares else "no token carries any"
    console.print(Text(f"loss {decimal(view.loss)} nats in all: {carried}", "label"))
    worst = sorted(view.tokens, key=lambda token: -token.loss)[:MOST_TOKENS]
    for line in aligned([_row(token) for token in worst if token.loss > 0]):
        console.print(Text(line), soft_wrap=True)


def _row(token: TokenView) -> dict[str, str]:
    return {
        "token": repr(token.text),
        "class": token.kind,
        "nats": decimal(token.divergence),
        "loss": decimal(token.loss),
        "student expected": _expected(token.student_expects),
        "teacher expected": _expected(token.teacher_expects),
        "entropy": f"{token.student_entropy:.2f} / {token.teacher_entropy:.2f}",
    }


def _expected(candidates: Sequence[tuple[str, float]]) -> str:
    return "  ".join(f"{escape_line(text)!r} {100 * share:.0f} %" for text, share in candidates[:2])


def shade(nats: float) -> str:
    """The style of a token that carries so much."""
    return next((style for most, style in SHADES if nats < most), DARKEST)
