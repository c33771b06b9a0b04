"""The life of whole runs: one that is left alone, one that is stopped by SIGTERM and resumed, one that runs out of
memory, and two that keep their state on the CPU."""

from __future__ import annotations

from functools import cache, partial

import torch

from gpu_checks.check import Bench, Check, Figure, Found
from gpu_checks.twin import SMALL
from gpu_checks.whole_runs import Run, bundled_weights
from opsd_cli.settings.errors import ExitCode
from opsd_cli.testing.fault_points import VARIABLE

STEPS = 3
NAMED = ("train.micro_batch_tokens", "loss.chunk_mib", "train.halve_on_oom")


def checks(bench: Bench) -> list[Check]:
    why = "on a card only: a CPU runs these steps in the group methods"
    offload = {"stage 2, optimizer on the CPU": ("zero=stage2_offload",),
               "stage 3, LoRA, everything on the CPU": ("zero=stage3_offload", "lora=r16")}  # fmt: skip
    return [
        Check("stopped by SIGTERM and resumed", partial(resumed, bench)),
        Check("out of memory", partial(out_of_memory, bench), "on a card only: a CPU checks the group memory"),
        Check(
            "drawn beside the ranks, a step ahead",
            partial(beside, bench),
            "on cards only: the tests do the same",
            lacks="" if bench.is_small or torch.cuda.device_count() > 1 else "needs two cards",
        ),
        *(Check(f"run, {name}", partial(completes, bench, name, words), why) for name, words in offload.items()),
    ]


@cache
def undisturbed(bench: Bench) -> Run:
    """A run that nothing happens to."""
    return Run(bench, "undisturbed").start((*SMALL, "checkpoint.every=1"))


def resumed(bench: Bench) -> Found:
    """On a card also against a run that was left alone: sums are made in any order, so the distance is information. On
    a CPU the two are the same bit for bit, which the tests of resuming hold."""
    whole = None if bench.is_small else undisturbed(bench)  # works while the other one does
    broken = Run(bench, "stopped").start((*SMALL, "checkpoint.every=1"), **{VARIABLE: "stall@step.reported:1:1.5"})
    broken.wait_for(lambda events: any(event["kind"] == "step" for event in events))
    stopped = broken.terminate()
    done_before = len(broken.steps())
    finished = broken.resume().wait()
    assert finished == ExitCode.DONE, broken.said()
    way = float((broken.weights() - bundled_weights("tiny")).norm())
    figures = [
        Figure("exit code of the stop", abs(stopped - ExitCode.TERMINATED), 0),
        Figure("steps", len(broken.steps()), STEPS, at_least=True),
        Figure("weights moved", way, 1e-3, at_least=True),
    ]
    if whole is not None:
        assert whole.wait() == ExitCode.DONE, whole.said()
        figures.append(Figure("apart, of that way", float((whole.weights() - broken.weights()).norm()) / way))
    return Found(tuple(figures), f"stopped after step {done_before}")


def out_of_memory(bench: Bench) -> Found:
    """A planted error: one line that names what to lower, and an exit code that says that trying again may help."""
    run = Run(bench, "out_of_memory").start(SMALL, **{VARIABLE: "oom@step.backward:2"})
    code, text = run.wait(), run.log.read_text(errors="replace")
    missing = [name for name in NAMED if name not in text]
    figures = (
        Figure("exit code", abs(code - ExitCode.ENVIRONMENT), 0), Figure("settings not named", len(missing), 0),
    )  # fmt: skip
    return Found(figures, f"exit code {code}; {run.said()[:100]}")


def beside(bench: Bench) -> Found:
    """Our decoder in a process on the second card: weights over NCCL, the first step on-policy, others with a lag."""
    words = ("sampler=separate", "launcher.ranks=1")
    run = Run(bench, "beside").start((*SMALL, *words))
    code = run.wait()
    steps = [event["metrics"] for event in run.events() if event["kind"] == "step"]
    gaps, lags = ([step.get(name, float("nan")) for step in steps] for name in ("sampler/logprob_gap", "sampler/lag"))
    figures = (
        Figure("exit code", code, 0), Figure("steps", len(steps), STEPS, at_least=True),
        Figure("gap of the first", gaps[0] if gaps else float("nan"), 2e-2, unit="nats"),
        Figure("lag of the others", min(lags[1:], default=float("nan")), 1, at_least=True),
    )  # fmt: skip
    return Found(figures, run.said())


def completes(bench: Bench, name: str, words: tuple[str, ...]) -> Found:
    run = Run(bench, name.replace(" ", "_").replace(",", "")).start((*SMALL, *words))
    code = run.wait()
    return Found((Figure("exit code", code, 0), Figure("steps", len(run.steps()), STEPS, at_least=True)), run.said())
