"""A problem, the two prompts it becomes, and what was sampled after one: types only. Shape letters of the program:

P problems in a step        G rollouts per problem      B rows of a micro-batch
S student length            T teacher length            N completion tokens in a micro-batch
n a chunk of N              D hidden size               V vocabulary              K top-k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
Turn = tuple[str, str]
"""One message of a conversation: its role (user or assistant) and its text."""

RolloutKey = tuple[int, int]
"""Which rollout of a run: the place of its problem in the stream of all problems, and its number there."""


@dataclass(frozen=True)
class Problem:
    """One dataset item: shown to both roles (question), to the teacher only (solution), graded against (answer)."""

    id: str
    question: str
    solution: str  # the verified reference solution; empty: the data have none
    answer: str | None  # the final answer alone, as the checker compares it; None: there is nothing to grade
    also_right: tuple[str, ...] = ()  # other answers that are accepted
    system: str = ""  # a system message of its own, before both prompts
    columns: tuple[tuple[str, str], ...] = ()  # other columns of its row that a context shows, as text
    earlier: tuple[Turn, ...] = ()  # what was said before the question, in both prompts

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every answer that is right; empty where nothing is graded."""
        return () if self.answer is None else (self.answer, *self.also_right)


@dataclass(frozen=True)
class PromptPair:
    """One problem rendered twice. Both prompts end where a completion begins."""

    problem: Problem
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]  # empty: nothing privileged could be shown, so the rollout carries no loss
    other_ids: tuple[int, ...] = ()  # a third prompt, where the target needs one


@dataclass(frozen=True)
class Rollout:
    """A prompt pair and one completion, as token ids; never text, never re-tokenised."""

    prompt: PromptPair
    completion_ids: tuple[int, ...]  # ends in an end-of-sequence id exactly when finish_reason is "stop"
    finish_reason: FinishReason
    logprobs: tuple[float, ...]  # the sampler's own log-probability of each completion token; empty off-policy
    place: int = 0  # of its problem in the stream of all problems: where epochs meet a step may see a problem twice
    number: int = 0  # among the rollouts of that problem, from 0
    correct: bool = False  # known once it is graded: it has the right answer
    lag: int | None = None  # steps that the weights which drew it are behind; None: its sampler does not count them

    @property
    def key(self) -> RolloutKey:
        """Unique among the rollouts of a run, on all ranks."""
        return self.place, self.number


@dataclass(frozen=True)
class Splits:
    """A dataset, read: disjoint lists, where they came from, and a fingerprint of their content."""

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    source: str  # for messages and the summary
    fingerprint: str  # sha256 over every problem in order: a resume refuses a changed dataset
    left_out: tuple[str, ...] = ()  # what was wrong with rows that were left out, a line for each split
    retention: tuple[Problem, ...] = ()  # a skill that training never shows, to measure what is forgotten
