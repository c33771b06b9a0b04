"""Problem -> PromptPair: each problem rendered twice, as token ids. Owns the length policy (nothing is cut
but the privileged solution, and only if asked; a problem that does not fit is dropped and counted) and the
rule that both prompts of a pair end alike. Which words stand in a message is `contexts`' business, the chat
format `chat`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

from opsd_cli.data.chat import ChatFormat, end_ids
from opsd_cli.data.contexts import CONTROLS, Context, Privileged
from opsd_cli.data.feedback import feedback_of
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.settings.config import PromptSettings
from opsd_cli.settings.errors import DataError

Other = Literal["none", "free", "wrong", "reference_only"]

CUT_MARK = "\n[...]\n"
"""Stands where the middle of a solution was taken out."""


@dataclass(frozen=True)
class Lengths:
    """Prompt lengths of one role before any was dropped or shortened, in tokens."""

    p50: int
    p99: int
    longest: int

    def __str__(self) -> str:
        return f"p50 {self.p50}, p99 {self.p99}, longest {self.longest}"


@dataclass(frozen=True)
class PromptReport:
    """What became of the problems of one call."""

    kept: int
    dropped_long: int
    shortened: int  # kept, with a cut solution
    student: Lengths
    teacher: Lengths

    def __str__(self) -> str:
        return (
            f"{self.kept} problems kept, {self.dropped_long} dropped as too long, {self.shortened} "
            f"with a shortened solution; tokens of student prompts: {self.student}; "
            f"of teacher prompts: {self.teacher}"
        )


class PromptRenderer:
    """Renders problems for one tokenizer. Making it probes the chat template: raises DataError when that is
    missing, fails or is hostile, and when the two roles' prompts would end differently (unless the settings
    allow it)."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        settings: PromptSettings,
        context: Context,
        instruction: str,
        other: Other = "none",
        chat_template: str | None = None,
    ) -> None:
        self.settings = settings
        self.other = other
        self.context = context
        self.instruction = instruction
        self.chat = ChatFormat(tokenizer, system=settings.system, chat_template=chat_template)
        self._prefix_length = self._check_endings()

    def render(self, problems: Sequence[Problem], *, seed: int) -> tuple[list[PromptPair], PromptReport]:
        """The prompt pairs of the problems that fit, in order, and what became of the others. `seed` decides
        what a control shows to whom. Raises DataError when more than `max_dropped_share` of the problems do
        not fit."""
        shown = self.context.privileged(problems, seed=seed)
        rendered = list(
            zip(
                problems,
                self._student_ids(problems),
                self._teacher_ids(problems, shown),
                self._other_ids(problems, shown, seed=seed),
                strict=True,
            )
        )
        pairs: list[PromptPair] = []
        shortened = 0
        for (problem, student_ids, teacher_ids, other_ids), privileged in zip(rendered, shown, strict=True):
            if self._fits(student_ids) and not self._fits(teacher_ids) and self.settings.overflow == "shorten":
                shorter = self._shortened(problem, privileged)
                shortened += shorter is not None
                teacher_ids = shorter or teacher_ids
            if self._fits(student_ids) and self._fits(teacher_ids) and self._fits(other_ids):
                pairs.append(self._pair(problem, student_ids, teacher_ids, other_ids))
        report = PromptReport(
            kept=len(pairs),
            dropped_long=len(problems) - len(pairs),
            shortened=shortened,
            student=_lengths([len(student_ids) for _, student_ids, _, _ in rendered]),
            teacher=_lengths([len(teacher_ids) for _, _, teacher_ids, _ in rendered]),
        )
        self._check_dropped(report)
        return pairs, report

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """A written completion (a reference solution) as ids, closed by the id that ends the assistant's
        turn."""
        return self.chat.encode_completion(text)

    def end_ids(self, generation_config: Any | None) -> tuple[int, ...]:
        """Every id that ends a completion: `chat.end_ids` and the one that closes a turn in the chat
        template."""
        return tuple(sorted({*end_ids(self.chat.tokenizer, generation_config), self.chat.turn_end_id}))

    def close(self) -> None:
        """Kill and reap the process that renders the template, if there is one."""
        self.chat.close()

    def __enter__(self) -> PromptRenderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _student_ids(self, problems: Sequence[Problem]) -> list[tuple[int, ...]]:
        texts = [self.context.student_text(problem, instruction=self.instruction) for problem in problems]
        return self.chat.prompt_ids(texts, thinking=self.settings.student_thinking)

    def _teacher_ids(self, problems: Sequence[Problem], shown: Sequence[Privileged]) -> list[tuple[int, ...]]:
        rows = list(zip(problems, shown, strict=True))
        context, words = self.context, self.instruction
        return self.chat.prompt_ids(
            [context.teacher_text(problem, instruction=words, shown=privileged) for problem, privileged in rows],
            systems=[context.system_text(problem, instruction=words, shown=privileged) for problem, privileged in rows],
            thinking=self.settings.teacher_thinking,
        )

    def _other_ids(
        self, problems: Sequence[Problem], shown: Sequence[Privileged], *, seed: int
    ) -> list[tuple[int, ...]]:
        """The third prompt of each problem, where the target needs one: the teacher without any reference (free), with
        another problem's (wrong), or with the reference and no problem (reference_only)."""
        if self.other == "none":
            return [()] * len(problems)
        if self.other == "free":
            texts = [self.context.student_text(problem, instruction=self.instruction) for problem in problems]
            return self.chat.prompt_ids(texts, thinking=self.settings.teacher_thinking)
        if self.other == "wrong":
            return self._teacher_ids(problems, CONTROLS["shuffled"](problems, seed))
        return self._teacher_ids([replace(problem, question="") for problem in problems], shown)

    @property
    def needs_feedback(self) -> bool:
        """Whether the teacher's prompts are made of a step's rollouts."""
        return self.context.is_sampled

    def with_feedback(
        self, rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]
    ) -> list[Rollout]:
        """The rollouts with teacher prompts made of each other: a correct sibling's text, else what is wrong with the
        rollout itself. One for which there is neither, or whose prompt is too long, gets no teacher prompt."""
        shown = feedback_of(rollouts, correct, texts)
        prompts = self._teacher_ids([rollout.prompt.problem for rollout in rollouts], shown)
        made = []
        for rollout, privileged, ids in zip(rollouts, shown, prompts, strict=True):
            usable = self._fits(ids) and (privileged.sibling or privileged.feedback)
            prompt = replace(rollout.prompt, teacher_ids=ids if usable else ())
            made.append(replace(rollout, prompt=prompt))
        return made

    def _fits(self, ids: tuple[int, ...]) -> bool:
        return len(ids) <= self.settings.max_tokens

    def _shortened(self, problem: Problem, shown: Privileged) -> tuple[int, ...] | None:
        """The teacher's prompt with as much of the solution as fits, or None when not even one character
        does."""
        best: tuple[int, ...] | None = None
        fits, too_long = 0, len(shown.solution)
        while too_long - fits > 1:
            keep = (fits + too_long) // 2
            shorter = Privileged(cut_middle(shown.solution, keep), shown.answer)
            ids = self._teacher_ids([problem], [shorter])[0]
            if self._fits(ids):
                fits, best = keep, ids
            else:
                too_long = keep
        return best

    def _check_endings(self) -> int:
        """The number of ids at the end of both prompts that must agree; 0 when they need not."""
        student_thinking, teacher_thinking = self.settings.student_thinking, self.settings.teacher_thinking
        student = self.chat.ending(thinking=student_thinking)
        teacher = self.chat.ending(thinking=teacher_thinking)
        if self.settings.allow_different_endings:
            return 0
        if student != teacher:
            raise DataError(
                f"the two prompts end differently: student {self._shown_ending(student)}, teacher "
                f"{self._shown_ending(teacher)}; give prompts.student_thinking ({student_thinking}) and "
                f"prompts.teacher_thinking ({teacher_thinking}) one value, or set "
                "prompts.allow_different_endings=true"
            )
        return self.chat.prefix_length(thinking=student_thinking)

    def _shown_ending(self, text: str) -> str:
        return f"{text[-80:]!r} = {list(self.chat.encode([text])[0][-12:])}"

    def _pair(
        self,
        problem: Problem,
        student_ids: tuple[int, ...],
        teacher_ids: tuple[int, ...],
        other_ids: tuple[int, ...],
    ) -> PromptPair:
        count = self._prefix_length
        if count and student_ids[-count:] != teacher_ids[-count:]:
            raise DataError(
                f"problem {problem.id}: the prompts end in different ids: student "
                f"{list(student_ids[-count:])}, teacher {list(teacher_ids[-count:])}; change the last "
                "paragraph of the context, or set prompts.allow_different_endings=true"
            )
        return PromptPair(problem, student_ids, teacher_ids, other_ids)

    def _check_dropped(self, report: PromptReport) -> None:
        total = report.kept + report.dropped_long
        share = report.dropped_long / max(total, 1)
        if report.dropped_long and (share > self.settings.max_dropped_share or not report.kept):
            raise DataError(
                f"{report.dropped_long} of {total} problems ({share:.1%}) are longer than "
                f"prompts.max_tokens={self.settings.max_tokens}, above "
                f"prompts.max_dropped_share={self.settings.max_dropped_share:g} "
                f"(student prompts: {report.student}; teacher prompts: {report.teacher}); raise "
                "prompts.max_tokens, set prompts.overflow=shorten, or raise prompts.max_dropped_share"
            )


def cut_middle(text: str, keep: int) -> str:
    """`keep` characters of `text`, three quarters from its start and the rest from its end, with a mark
    between: the first steps and the final answer stay."""
    head = (keep * 3 + 3) // 4
    tail = keep - head
    return text[:head] + CUT_MARK + text[len(text) - tail :]


def _lengths(counts: list[int]) -> Lengths:
    ordered = sorted(counts) or [0]
    return Lengths(
        p50=ordered[(len(ordered) - 1) // 2], p99=ordered[(len(ordered) - 1) * 99 // 100], longest=ordered[-1]
    )
