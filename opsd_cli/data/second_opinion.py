"""A grader that shares nothing with opsd's own: math-verify finds and compares the answer in the whole completion. To
see how much of an accuracy is the grader's. Run as a program, this file is the child process that does it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opsd_cli.data.answer_marks import marked_answer
from opsd_cli.data.answers import Grade
from opsd_cli.safety.sandbox import BoundedChild, ChildError, ChildStartError, serve
from opsd_cli.settings.errors import GuardError
from opsd_cli.settings.registry import plugin

LAST_CHARS = 4000  # of a completion, in which the library looks for its answer


@plugin("grader", "math_verify")
class MathVerifyGrader:
    """math-verify's own extraction and comparison. For numbers and formulas: it knows no letters, words or dates."""

    def build(self) -> MathVerify:
        return MathVerify()


class MathVerify:
    """The live grader: one child process, which is killed when a completion takes `seconds`."""

    def __init__(self, *, seconds: float = 3.0) -> None:
        self._child = BoundedChild("opsd_cli.data.second_opinion", seconds=seconds)

    def grade(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[Grade]:
        """Of each (completion, accepted answers) whether they agree, and whether an answer was found. What cannot be
        read, or takes too long, is wrong. Raises GuardError where math-verify does not start."""
        return [self._grade_one(completion, accepted) for completion, accepted in pairs]

    def _grade_one(self, completion: str, accepted: Sequence[str]) -> Grade:
        stated = False
        for reference in accepted:
            gold = marked_answer(reference) or reference
            try:
                found, same = self._child.ask({"completion": completion[-LAST_CHARS:], "gold": gold})
            except ChildStartError as error:
                raise GuardError(f"the second grader cannot run: {error}; is math-verify installed?") from None
            except ChildError:
                continue
            stated = stated or found
            if same:
                return Grade(correct=True, stated=True)
        return Grade(correct=False, stated=stated)

    def close(self) -> None:
        """Kill and reap the child process, if there is one."""
        self._child.close()


def look(request: dict[str, str]) -> tuple[bool, bool]:
    """Whether the library finds an answer in the completion, and whether it is the reference's. Its own timeouts are
    off: they are signals, and return False silently."""
    from math_verify import parse, verify

    gold = parse(f"${request['gold']}$", parsing_timeout=None)
    answer = parse(request["completion"], parsing_timeout=None)
    return bool(answer), bool(gold and answer and verify(gold, answer, timeout_seconds=None))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    assert look({"gold": "x/2", "completion": "So it is $\\frac{2x}{4}$."}) == (True, True)
    serve(look)
