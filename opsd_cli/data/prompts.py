"""Problem -> PromptPair: each problem rendered twice, or three times where the target needs it, as token ids.

Nothing is cut but the privileged solution or sibling, and only on request; a problem that does not fit is dropped and
counted. All prompts of a pair end in the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opsd_cli.data.chat import ChatFormat, Mode, end_ids, read_variables
from opsd_cli.data.contexts import Context, Other
from opsd_cli.data.privileged import CUT, Privileged, partners
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.settings.config import PromptSettings
from opsd_cli.settings.errors import DataError

Watch = Callable[[int, int], None]
"""Told how many of how many problems are rendered."""

AT_ONCE = 1024  # problems rendered between two reports of progress


class Lengths:
    """Prompt lengths of one role, in tokens, before any prompt was dropped or shortened; zeros without prompts."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        ordered = sorted(len(ids) for ids in prompts) or [0]
        last = len(ordered) - 1
        self.p50, self.p99, self.longest = ordered[last // 2], ordered[last * 99 // 100], ordered[-1]

    def __str__(self) -> str:
        return f"p50 {self.p50}, p99 {self.p99}, longest {self.longest}"


@dataclass(frozen=True)
class PromptReport:
    """How many problems of one call were kept, dropped or shortened, and how long their prompts were."""

    kept: int
    dropped_long: int
    shortened: int  # kept, with a cut solution
    student: Lengths
    teacher: Lengths
    other: Lengths | None  # of the third prompts, where the target needs them

    def __str__(self) -> str:
        return (
            f"{self.kept} problems kept, {self.dropped_long} dropped as too long, {self.shortened} "
            f"with a shortened solution; tokens of {self._lengths}"
        )

    def check(self, settings: PromptSettings) -> None:
        """Raises DataError when more than `max_dropped_share` of the problems were dropped, or all of them."""
        total = self.kept + self.dropped_long
        share = self.dropped_long / max(total, 1)
        if self.dropped_long and (share > settings.max_dropped_share or not self.kept):
            raise DataError(
                f"{self.dropped_long} of {total} problems ({share:.1%}) are longer than "
                f"prompts.max_tokens={settings.max_tokens}, above "
                f"prompts.max_dropped_share={settings.max_dropped_share:g} ({self._lengths}); raise "
                "prompts.max_tokens, set prompts.overflow=shorten, or raise prompts.max_dropped_share"
            )

    @property
    def _lengths(self) -> str:
        third = "" if self.other is None else f"; of third prompts: {self.other}"
        return f"student prompts: {self.student}; of teacher prompts: {self.teacher}{third}"


@dataclass(frozen=True)
class Draft:
    """A pair before the length policy, and what its privileged prompts were made of."""

    pair: PromptPair
    shown: Privileged  # in the teacher's prompt
    other_shown: Privileged  # in the third prompt
    is_shortened: bool = False


class PromptRenderer:
    """Renders problems for one tokenizer. `other` adds a third prompt to each problem. The constructor probes the
    chat template: it raises DataError when that is missing, fails or is hostile, and when the two roles' prompts
    would end differently (unless the settings allow it); ConfigError when `other` does not suit the context."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        settings: PromptSettings,
        context: Context,
        instruction: str,
        other: Other = "none",
        view: Context | None = None,
    ) -> None:
        context.check_other(other)
        self.settings, self.context, self.instruction, self.other = settings, context, instruction, other
        self._view = view  # of a teacher's second pass, for other=view
        self.chat = ChatFormat(tokenizer, system=settings.system, date=settings.date)
        self.student_mode = Mode(settings.student_thinking, read_variables(settings.student_variables))
        self.teacher_mode = Mode(settings.teacher_thinking, read_variables(settings.teacher_variables))
        self._prefix_length = self._check_endings()

    @property
    def needs_feedback(self) -> bool:
        """Whether the teacher's prompts need a step's rollouts: until `with_feedback` they show nothing of them."""
        return self.context.is_sampled

    def render(
        self, problems: Sequence[Problem], *, seed: int, with_other: bool = True
    ) -> tuple[list[PromptPair], PromptReport]:
        """The prompt pairs of the problems that fit, in order, and a report of all. `seed` decides what a control shows
        to whom. Without `with_other` there is no third prompt: for evaluation, where it must not decide which problems
        fit. Raises DataError when more than `max_dropped_share` of the problems do not fit."""
        pairs, report = self.fitting(problems, range(len(problems)), seed=seed, with_other=with_other)
        report.check(self.settings)
        return [pair for pair in pairs if pair is not None], report

    def fitting(
        self,
        problems: Sequence[Problem],
        positions: Sequence[int],
        *,
        seed: int,
        with_other: bool = True,
        watch: Watch = lambda done, total: None,
    ) -> tuple[list[PromptPair | None], PromptReport]:
        """The prompt pairs of the problems at these positions, None for one that does not fit, and a report of them.
        The other problems are there for what a control shows. `watch` is told how many are done, and may raise."""
        other = self.other if with_other else "none"
        shown = self.context.privileged(problems, seed=seed)
        other_shown = [shown[i] for i in partners(len(shown), seed)] if other == "wrong" else shown
        drafts: list[Draft] = []
        for start in range(0, len(positions), AT_ONCE):
            watch(start, len(positions))
            some = positions[start : start + AT_ONCE]
            students = self._students([problems[i] for i in some])
            drafts += self._drafts(students, [shown[i] for i in some], [other_shown[i] for i in some], other)
        fitted = [self._fit(draft, other) for draft in drafts]
        kept = [draft for draft in fitted if draft is not None]
        report = PromptReport(
            kept=len(kept),
            dropped_long=len(drafts) - len(kept),
            shortened=sum(draft.is_shortened for draft in kept),
            student=Lengths([draft.pair.student_ids for draft in drafts]),
            teacher=Lengths([draft.pair.teacher_ids for draft in drafts]),
            other=None if other == "none" else Lengths([draft.pair.other_ids for draft in drafts]),
        )
        return [None if draft is None else self._check_pair(draft.pair) for draft in fitted], report

    def _students(self, problems: Sequence[Problem]) -> list[PromptPair]:
        """The problems under the student's prompt alone."""
        student_ids = self._public_ids(problems, mode=self.student_mode)
        return [PromptPair(problem, ids, ()) for problem, ids in zip(problems, student_ids, strict=True)]

    def with_feedback(
        self, rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str], written: Sequence[str] = ()
    ) -> tuple[list[Rollout], dict[str, float]]:
        """The rollouts with teacher prompts (and third prompts) made of each other: a correct sibling's text, else
        what is wrong with the rollout itself. `texts` are the completions without control tokens. Student prompts
        and completions stay as they are. A rollout for which there is nothing to show, or whose prompt is too long,
        gets no teacher prompt; the counts, by metric name, say how many. Only where `needs_feedback`."""
        assert self.needs_feedback, "this context shows nothing of rollouts"
        each = self.context.privileged_of(rollouts, correct, texts, written)
        shown = {index: privileged for index, privileged in enumerate(each) if privileged is not None}
        privileged = list(shown.values())
        drafts = self._drafts([rollouts[index].prompt for index in shown], privileged, privileged, self.other)
        fitting = zip(shown, (self._fit(draft, self.other) for draft in drafts), strict=True)
        kept = {index: draft for index, draft in fitting if draft is not None}
        counts = {
            "rollout/without_context": float(len(rollouts) - len(kept)),
            "rollout/context_too_long": float(len(drafts) - len(kept)),
            "rollout/context_shortened": float(sum(draft.is_shortened for draft in kept.values())),
        }
        prompts = {index: self._check_pair(draft.pair) for index, draft in kept.items()}
        return [
            replace(rollout, prompt=prompts.get(index, replace(rollout.prompt, teacher_ids=())))
            for index, rollout in enumerate(rollouts)
        ], counts

    def request_ids(
        self, rollouts: Sequence[Rollout], correct: Sequence[bool], texts: Sequence[str]
    ) -> list[tuple[int, ...]]:
        """The prompt by which the policy writes about each rollout; empty for one over prompts.max_tokens, about which
        nothing is written."""
        messages = self.context.requests(rollouts, correct, texts)
        systems = [rollout.prompt.problem.system for rollout in rollouts]
        prompts = self.chat.prompt_ids(messages, systems=systems, mode=self.student_mode) if messages else []
        return [ids if len(ids) <= self.settings.max_tokens else () for ids in prompts]

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """A reference solution as the student would have written it after its prompt."""
        return self.chat.encode_completion(text, mode=self.student_mode)

    def end_ids(self, generation_config: Any | None) -> tuple[int, ...]:
        """Every id that ends a completion: `chat.end_ids` and the one that closes a turn in the chat template."""
        return tuple(sorted({*end_ids(self.chat.tokenizer, generation_config), self.chat.turn_end_id}))

    def close(self) -> None:
        """Kill and reap the process that renders the template, if there is one."""
        self.chat.close()

    def _public_ids(self, problems: Sequence[Problem], *, mode: Mode) -> list[tuple[int, ...]]:
        texts = [self.context.student_text(problem, instruction=self.instruction) for problem in problems]
        systems, earlier = [problem.system for problem in problems], [problem.earlier for problem in problems]
        return self.chat.prompt_ids(texts, systems=systems, earlier=earlier, mode=mode)

    def _teacher_ids(
        self, context: Context, problems: Sequence[Problem], shown: Sequence[Privileged]
    ) -> list[tuple[int, ...]]:
        rows = list(zip(problems, shown, strict=True))
        words = self.instruction
        return self.chat.prompt_ids(
            [context.teacher_text(problem, instruction=words, shown=privileged) for problem, privileged in rows],
            systems=[
                "\n\n".join(filter(None, (problem.system, context.system_text(problem, instruction=words, shown=one))))
                for problem, one in rows
            ],
            earlier=[problem.earlier for problem in problems],
            mode=self.teacher_mode,
        )

    def _other_ids(
        self, problems: Sequence[Problem], shown: Sequence[Privileged], other: Other
    ) -> list[tuple[int, ...]]:
        if other == "none":
            return [()] * len(problems)
        if other == "free":
            return self._public_ids(problems, mode=self.teacher_mode)
        if other == "reference_only":
            problems = [replace(problem, question="", earlier=()) for problem in problems]
        if other == "view":
            assert self._view is not None, "refused by opsd_cli.checks"
            return self._teacher_ids(self._view, problems, shown)
        return self._teacher_ids(self.context, problems, shown)

    def _drafts(
        self, pairs: Sequence[PromptPair], shown: Sequence[Privileged], other_shown: Sequence[Privileged], other: Other
    ) -> list[Draft]:
        """The pairs with new privileged prompts, rendered in one batch."""
        problems = [pair.problem for pair in pairs]
        teacher_ids = self._teacher_ids(self.context, problems, shown)
        other_ids = self._other_ids(problems, other_shown, other)
        return [
            Draft(replace(pair, teacher_ids=teacher, other_ids=third), privileged, third_privileged)
            for pair, teacher, third, privileged, third_privileged in zip(
                pairs, teacher_ids, other_ids, shown, other_shown, strict=True
            )
        ]

    def _fits(self, pair: PromptPair) -> bool:
        return max(map(len, (pair.student_ids, pair.teacher_ids, pair.other_ids))) <= self.settings.max_tokens

    def _fit(self, draft: Draft, other: Other) -> Draft | None:
        """The draft if all its prompts fit; where that is allowed, with as much of its privileged texts as fits; or
        None when not even one character does."""
        if self._fits(draft.pair):
            return draft
        if self.settings.overflow == "drop" or len(draft.pair.student_ids) > self.settings.max_tokens:
            return None
        if self.context.teacher_placeholders.isdisjoint(CUT) and not self.context.columns:
            return None
        # How many tokens a character becomes depends on its neighbours and on the template: try, by bisection.
        best: Draft | None = None
        fits, too_long = 0, max(draft.shown.longest, draft.other_shown.longest)
        while too_long - fits > 1:
            keep = (fits + too_long) // 2
            shorter = self._drafts([draft.pair], [draft.shown.cut(keep)], [draft.other_shown.cut(keep)], other)[0]
            if self._fits(shorter.pair):
                fits, best = keep, replace(shorter, is_shortened=True)
            else:
                too_long = keep
        return best

    def _check_endings(self) -> int:
        """The number of ids at the end of all prompts that must agree; 0 when they need not."""
        student_thinking, teacher_thinking = self.settings.student_thinking, self.settings.teacher_thinking
        student = self.chat.ending(mode=self.student_mode)
        own_system = self.context.teacher_system is not None
        teacher = self.chat.ending(mode=self.teacher_mode, own_system=own_system)
        if self.settings.allow_different_endings:
            return 0
        if student != teacher:
            ours, theirs = (
                f"{text[-80:]!r} = {list(self.chat.encode([text])[0][-12:])}" for text in (student, teacher)
            )
            raise DataError(
                f"the two prompts end differently: student {ours}, teacher {theirs}; give prompts.student_thinking "
                f"({student_thinking}) and prompts.teacher_thinking ({teacher_thinking}) one value, or set "
                "prompts.allow_different_endings=true"
            )
        return self.chat.prefix_length(mode=self.student_mode)

    def _check_pair(self, pair: PromptPair) -> PromptPair:
        count = self._prefix_length
        endings = {"student": pair.student_ids[-count:], "teacher": pair.teacher_ids[-count:]}
        if pair.other_ids:
            endings["third prompt"] = pair.other_ids[-count:]
        if count and len(set(endings.values())) > 1:
            listed = ", ".join(f"{role} {list(ids)}" for role, ids in endings.items())
            raise DataError(
                f"problem {pair.problem.id}: the prompts end in different ids: {listed}; change the last paragraph of "
                "the context, or set prompts.allow_different_endings=true"
            )
        return pair
