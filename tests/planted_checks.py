"""A group of checks for test_gpu: one that passes, one that raises, one that never ends, and one behind it."""

from __future__ import annotations

import time

from gpu_checks.check import Bench, Check, Figure, Found


def checks(bench: Bench) -> list[Check]:
    def passes() -> Found:
        return Found((Figure("error", 1e-7, 1e-3), Figure("share", 0.95, 0.9, at_least=True)))

    def is_off() -> Found:
        return Found((Figure("error", float("nan"), 1e-3),))

    def raises() -> Found:
        raise RuntimeError("CUDA error: misaligned address")

    def hangs() -> Found:
        time.sleep(600)
        return passes()

    return [
        Check("passes", passes), Check("is off", is_off), Check("raises", raises),
        Check("for a card", raises, "needs a card: it is planted"), Check("hangs", hangs), Check("behind it", passes),
    ]  # fmt: skip
