"""recipe=quickstart, whole: 80 steps from about a third of the problems right to nearly all. Two runs side by side, in
the card's own type and in fp32."""

from __future__ import annotations

from functools import cache, partial

from gpu_checks.check import Bench, Check, Figure, Found
from gpu_checks.whole_runs import Run

DTYPES = ("bfloat16", "float32")
ACCURACY = 0.9  # 0.95 on a CPU, on 500 problems


def checks(bench: Bench) -> list[Check]:
    why = "on a card only: on a CPU it takes minutes"
    return [Check(f"accuracy in {dtype}", partial(learns, bench, dtype), why) for dtype in DTYPES]


@cache
def started(bench: Bench) -> dict[str, Run]:
    return {
        dtype: Run(bench, f"quickstart_{dtype}").start(("recipe=quickstart", f"model.dtype={dtype}"))
        for dtype in DTYPES
    }


def learns(bench: Bench, dtype: str) -> Found:
    run = started(bench)[dtype]
    code = run.wait()
    measured = run.accuracies() or [0.0]
    figures = (
        Figure("exit code", code, 0), Figure("accuracy", measured[-1], ACCURACY, at_least=True),
        Figure("before", measured[0]),
    )  # fmt: skip
    return Found(figures, run.said()[:100])
