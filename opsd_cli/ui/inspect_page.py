"""`opsd inspect` as one HTML file: every token with what either role expected, by pointer, focus and keyboard, without
a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsd_cli.insight.samples import RolloutView, TokenView
from opsd_cli.ui.differences import Marked, differences
from opsd_cli.ui.pages import render
from opsd_cli.ui.sample_view import SHADES, shade
from opsd_cli.ui.theme import decimal, percent, plural


@dataclass(frozen=True)
class ShownRollout:
    title: str
    note: str
    against: str  # the words of a second teacher; empty for the first
    student: Marked
    teacher: Marked
    tokens: Sequence[tuple[TokenView, str]]  # with its shade
    classes: str


def inspect_page(looked: Sequence[Sequence[RolloutView]], *, title: str, against: str) -> str:
    """The whole document."""
    shown = [_shown(view, against if view is not views[0] else "", views[0]) for views in looked for view in views]
    page = {"title": title, "rollouts": shown}
    return render("inspect.html", page=page, shades=SHADES, percent=percent, decimal=decimal)


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
        classes=shares or "no token carries loss",
    )
