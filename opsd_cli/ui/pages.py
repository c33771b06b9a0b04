"""Pages as single HTML files: no script, no request, and every text from models and data shown literally; and the page
of `opsd inspect`, every token of it with what either role expected, by pointer, focus and keyboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opsd_cli.insight.samples import RolloutView, TokenView
from opsd_cli.safety.secrets import redact
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.ui.differences import Marked, differences
from opsd_cli.ui.sample_view import SHADES, shade
from opsd_cli.ui.theme import decimal, percent, plural

MOST_TOKENS = 12  # that are named above a completion, to go to

PAGES = Path(__file__).parents[1] / "assets" / "pages"


def render(template: str, **values: Any) -> str:
    """A template of assets/pages with the common style sheet."""
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _literal(value) if type(value) is str else value,
    )  # fmt: skip
    css = Markup((PAGES / "page.css").read_text(encoding="utf-8"))  # ours; escaped, `a > b` would select nothing
    return environment.get_template(template).render(css=css, **values)


def _literal(text: str) -> str:
    """As it is, except that what would reorder or hide text is shown by its code, and secrets are left out."""
    return redact(escape_controls(text))


@dataclass(frozen=True)
class ShownRollout:
    title: str
    note: str
    against: str  # the words of a second teacher; empty for the first
    student: Marked
    teacher: Marked
    tokens: Sequence[tuple[TokenView, str]]  # with its shade
    most: Sequence[tuple[int, TokenView]]  # those that carry most, by their place from 1
    classes: str


def inspect_page(looked: Sequence[Sequence[RolloutView]], *, title: str, against: str) -> str:
    """The whole document."""
    shown = [_shown(view, against if view is not views[0] else "", views[0]) for views in looked for view in views]
    page = {"title": title, "rollouts": shown}
    return render("inspect.html", page=page, shades=SHADES, percent=percent, decimal=decimal, visible=visible)


def visible(text: str) -> str:
    """A token by itself, with what could not be seen of it: blanks at its ends, ends of lines."""
    shown = text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d")
    body = shown.strip(" ")
    start = len(shown) - len(shown.lstrip(" "))
    return "\u2423" * start + body + "\u2423" * (len(shown) - start - len(body) if body else 0)


def _shown(view: RolloutView, against: str, first: RolloutView) -> ShownRollout:
    _, teacher = differences(first.teacher_prompt if against else view.student_prompt, view.teacher_prompt)
    shares = ", ".join(f"{kind} {percent(share)}" for kind, share in view.share_by_class.items())
    verdict = "right" if view.correct else f"wrong (answer: {view.answer})" if view.answer else "not graded"
    return ShownRollout(
        title=f"{view.problem}: {verdict}",
        note=f"{plural(len(view.tokens), 'token')}, {decimal(view.loss)} nats in all; the first tenth carries "
        f"{percent(view.first_tenth)}; ended by {view.finish_reason}",
        against=against,
        student=differences(view.student_prompt, view.teacher_prompt)[0],
        teacher=teacher,
        tokens=[(token, f"{shade(token.loss):.2f}") for token in view.tokens],
        most=_most(view),
        classes=shares or "no token carries loss",
    )


def _most(view: RolloutView) -> list[tuple[int, TokenView]]:
    """The tokens that carry most, by their place from 1; none with less than a hundredth of the first."""
    ranked = sorted(enumerate(view.tokens, start=1), key=lambda pair: -pair[1].loss)[:MOST_TOKENS]
    return [(place, token) for place, token in ranked if token.loss > 0.01 * ranked[0][1].loss]
