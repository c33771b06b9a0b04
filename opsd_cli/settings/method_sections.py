"""Settings of a method beside its teacher, context, sampler and divergence: over which part of the vocabulary, with
which clip, towards which target, at which tokens; and the guard that watches a run. Types and ranges only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opsd_cli.settings.registry import settings


@settings
class SupportSettings:
    """The part of the vocabulary a divergence is taken over (`method.support`)."""

    side: Literal["full", "teacher", "student", "union"]  # whose k likeliest tokens; full: all of them, exact
    k: Annotated[int, Field(gt=0)]
    rest: Literal["renormalise", "tail", "drop"]  # what becomes of the rest of the probability


@settings
class ClipSettings:
    """What is done about tokens whose divergence is large (`method.clip`)."""

    kind: Literal["none", "entry", "neutral", "token"]
    limit: Annotated[float, Field(gt=0)]  # nats


@settings
class TargetSettings:
    """What the student is pulled towards, made of the teacher's pass and perhaps others (`method.target`)."""

    kind: Literal["teacher", "barycentre", "guided"]
    weight: Annotated[float, Field(ge=0)]  # barycentre: share of the teacher; guided: strength
    other: Literal["none", "free", "wrong", "reference_only"]  # guided: the prompt of the second pass


@settings
class TokenSettings:
    """Which completion tokens carry loss, and how much (`method.token_rules`). Rules multiply."""

    skip_first: Annotated[int, Field(ge=0)]  # tokens at the start of a completion without loss
    ramp: Annotated[float, Field(ge=0, le=1)]  # weights rise from 1 - ramp to 1 + ramp along a completion
    skip_special: bool  # no loss on control tokens, but on the end of the sequence
    keep: Literal["all", "correct", "wrong"]  # rollouts by their answer
    gate: Literal["none", "student_entropy", "teacher_entropy", "privilege"]
    gate_min: float  # nats; a token at or below it carries no loss


@settings
class GuardSettings:
    """What is done when a run goes wrong (`insight.guard`)."""

    action: Literal["off", "warn", "stop"]  # stop: restore the best checkpoint and end
    window: Annotated[int, Field(gt=0)]  # steps averaged; the first window is what later ones are compared with
    entropy_ratio: Annotated[float, Field(gt=1)]  # student entropy over its first window's, or below its inverse
    length_ratio: Annotated[float, Field(gt=1)]  # completion length, likewise
    truncated_share: Annotated[float, Field(gt=0, le=1)]  # completions cut by the length limit
    repeated_share: Annotated[float, Field(gt=0, le=1)]  # completions that repeat themselves
    leak_share: Annotated[float, Field(gt=0, le=1)]  # completions that speak of the reference
    accuracy_drop: Annotated[float, Field(gt=0, le=1)]  # of held-out accuracy below the best so far
    spike_ratio: Annotated[float, Field(gt=1)]  # the objective over its mean in the window before; only ever a warning
    nonfinite_patience: Annotated[int, Field(gt=0)]  # refused updates in a row after which the run stops, guard or not
