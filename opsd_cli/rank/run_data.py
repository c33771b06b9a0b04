"""Everything a run reads before it loads weights: data, tokenizer, prompts, and what became of the problems, in words.
Apart from `build`, because a dry run stops here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from opsd_cli.data.contexts import Context, second_view
from opsd_cli.data.control_tokens import ControlTokens
from opsd_cli.data.graders import Grades
from opsd_cli.data.problems import Problem, PromptPair, Rollout, Splits
from opsd_cli.data.prompts import PromptRenderer, PromptReport, Watch
from opsd_cli.data.references import check_references
from opsd_cli.data.stream import PromptStream
from opsd_cli.data.token_rules import Completion, checked_weights
from opsd_cli.engine.device import Card, choose_dtype
from opsd_cli.engine.loading import Source, asked_once, find_source, load_tokenizer, read_config
from opsd_cli.engine.model_limits import table_of
from opsd_cli.engine.process_group import Ranks, alone
from opsd_cli.loss.chunked_head import Objective, try_out
from opsd_cli.rank.advice import prompt_notes, prompt_warnings
from opsd_cli.rank.data_checks import (
    check_answers,
    check_row_length,
    check_tokens,
    graded_problems,
    read_splits,
)
from opsd_cli.rank.drift_monitor import count_signs
from opsd_cli.settings.config import Config
from opsd_cli.settings.registry import RegisteredTokenRule, find_plugin
from opsd_cli.training.step_report import Inspection

Tell = Callable[[str], None]
Write = Callable[[Sequence[Rollout], Sequence[Sequence[int]]], list[tuple[int, ...]]]
"""Draws what the policy writes about each rollout, after a prompt for each; nothing where the prompt is empty."""


@dataclass(frozen=True)
class RunData:
    """Everything a run reads before it loads weights: data, tokenizer and prompts."""

    splits: Splits
    source: Source
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    stream: PromptStream | None  # of training prompts; None where nothing is trained
    eval_prompts: list[PromptPair]
    retention_prompts: list[PromptPair]
    notes: list[str]  # what became of the problems, in words
    warnings: dict[str, str]  # name -> what the user should know before the first step
    grader: Grades
    graded: bool  # the training problems have answers to grade completions against
    second_grader: Grades | None = None  # of evaluations

    @property
    def train_prompts(self) -> PromptStream:
        """The prompts of a run that trains."""
        assert self.stream is not None, "nothing is trained"
        return self.stream

    def texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        """The completions as text, without control tokens."""
        ids = [list(rollout.completion_ids) for rollout in rollouts]
        # transformers decodes an empty batch to one empty text.
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []

    def inspect(self, rollouts: Sequence[Rollout]) -> Inspection:
        """Which completions state their problem's answer, and signs of a run that drifts."""
        texts = self.texts(rollouts)
        grades = self.grader.grade([(t, r.prompt.problem.accepted) for t, r in zip(texts, rollouts, strict=True)])
        correct, stated = [grade.correct for grade in grades], [grade.stated for grade in grades]
        verdicts = self.renderer.context.verdicts_on(rollouts, correct, texts)
        signs = count_signs(rollouts, texts, correct)
        return Inspection(texts, correct, stated, signs, graded=self.graded, verdicts=verdicts)

    def inspect_measured(self, rollouts: Sequence[Rollout]) -> Inspection:
        """The same of an evaluation's rollouts, which a second grader may grade too."""
        seen = self.inspect(rollouts)
        if self.second_grader is None:
            return seen
        pairs = [(text, r.prompt.problem.accepted) for text, r in zip(seen.texts, rollouts, strict=True)]
        return replace(seen, second=[grade.correct for grade in self.second_grader.grade(pairs)])

    def with_feedback(
        self, rollouts: Sequence[Rollout], correct: Sequence[bool], write: Write | None = None
    ) -> tuple[list[Rollout], dict[str, float]]:
        """Rebuild the teacher's prompts of a context that is made of rollouts, or of what the policy writes about them;
        others stay as they are. Beside them counts by metric name, where there was anything to rebuild. Collective."""
        if not self.renderer.needs_feedback:
            return list(rollouts), {}
        texts = self.texts(rollouts)
        if write is None:
            return self.renderer.with_feedback(rollouts, correct, texts)
        written = write(rollouts, self.renderer.request_ids(rollouts, correct, texts))
        notes = self.tokenizer.batch_decode([list(ids) for ids in written], skip_special_tokens=True) if written else []
        rebuilt, counts = self.renderer.with_feedback(rollouts, correct, texts, [note.strip() for note in notes])
        return rebuilt, counts | {"rollout/written_tokens": float(sum(map(len, written)))}

    def token_factors(self, rule: RegisteredTokenRule, rollout: Rollout, text: str, correct: bool) -> list[float]:
        """What a rule of the user's own says of each token of a completion, whose text is known."""
        ids = rollout.completion_ids
        tokens = tuple(self.tokenizer.batch_decode([[token] for token in ids])) if ids else ()
        completion = Completion(rollout.prompt.problem, ids, tokens, text, correct, rollout.finish_reason)
        return checked_weights(rule, completion, name=rule.plugin_name)

    def close(self) -> None:
        """Reap the child processes."""
        self.renderer.close()
        self.grader.close()
        if self.second_grader is not None:
            self.second_grader.close()


def load_run_data(
    config: Config,
    cards: Sequence[Card],
    tell: Tell,
    *,
    train: bool,
    tell_done: Callable[[str, int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> RunData:
    """Read data and tokenizer and render every prompt that will be needed, each once on every node of the `ranks`
    (None: there is one rank). `cards` are the devices of all ranks. `tell_done` is told a phase, and how many of how
    many items are done, as often on every rank; it may raise. Collective."""
    if train:
        try_out(Objective.of(config).divergence, name=config.divergence.plugin_name, support=config.support)
    dtype, why = choose_dtype(config.model.dtype, cards)
    tell("reading the dataset")
    ranks = ranks or alone()
    splits = read_splits(config, ranks)
    tell("loading the tokenizer")
    source = ranks.node.once(partial(find_source, config.model, dtype=dtype, tell=tell))
    model_config, tokenizer, generation = read_model_files(config, source, ranks)
    check_row_length(config, model_config)
    renderer = make_renderer(config, tokenizer)
    tell("rendering prompts")
    notes = [f"dataset: {splits.source}", *splits.left_out, weights_line(config, dtype, why)]
    graded = check_answers(config, splits, train=train)
    held_out = graded_problems(config, splits, notes, train=train)
    problems = plain_problems(
        config, tokenizer, notes,
        train=splits.train if train else (), held_out=held_out, retention=splits.retention if held_out else (),
    )  # fmt: skip
    watch = partial(tell_done, "rendering prompts") if tell_done else ignore
    names = (config.eval.split, "retention")
    with renderer.chat.shared(ranks.node):
        stream = training_prompts(config, problems["train"], renderer, notes, watch) if train else None
        eval_prompts, retention = (held_out_prompts(config, name, problems[name], renderer, notes) for name in names)
    used = [*(stream.rendered if stream else ()), *eval_prompts, *retention]
    check_tokens(model_config, renderer, used)
    grader = config.grader.build()
    references = check_references(grader, [pair.problem for pair in used])
    notes += [str(references)] if references.graded else []
    warnings = {} if references.warning is None else {"references": references.warning}
    if used:
        ending = renderer.chat.ending(mode=renderer.student_mode)
        notes += prompt_notes(renderer.chat.template, ending, date=config.prompts.date)
        vocabulary, prompt_ids = table_of(model_config), used[0].student_ids
        warnings |= prompt_warnings(tokenizer, prompt_ids, vocabulary=vocabulary, generation=generation)
    named = config.eval.second_grader
    second = None if named is None else find_plugin("grader", named)().build()
    return RunData(
        splits, source, tokenizer, renderer, stream, eval_prompts, retention, notes, warnings, grader, graded, second
    )


def make_renderer(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    """What makes prompts of problems, as the config says."""
    return PromptRenderer(
        tokenizer,
        settings=config.prompts,
        context=Context(config.context),
        instruction=config.dataset.instruction,
        other=config.target.other,
        view=second_view(config.context, config.target.view),
    )


def weights_line(config: Config, dtype: torch.dtype, why: str) -> str:
    """Which weights, in which format."""
    number_format = str(dtype).removeprefix("torch.") + (f" ({why})" if why else "")
    packed = "; frozen ones of its layers in 4 bits" if config.model.quantize == "4bit" else ""
    return f"weights: {config.model.path} in {number_format}{packed}"


def plain_problems(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str],
    *,
    train: Sequence[Problem],
    held_out: Sequence[Problem],
    retention: Sequence[Problem],
) -> dict[str, tuple[Problem, ...]]:
    """The problems of each set with no control token in their text; what was changed for that goes to `notes`."""
    control = ControlTokens(tokenizer)
    cleared: dict[str, tuple[Problem, ...]] = {}
    for name, problems in {"train": train, config.eval.split: held_out, "retention": retention}.items():
        cleared[name], escaped = control.clear(problems, how=config.prompts.control_tokens)
        notes += [f"{name}: control tokens made plain text in {escaped} problems"] if escaped else []
    return cleared


def held_out_prompts(
    config: Config, name: str, problems: Sequence[Problem], renderer: PromptRenderer, notes: list[str]
) -> list[PromptPair]:
    """The prompts of a set that is only measured; what became of them goes to `notes`."""
    if not problems:
        return []
    # Without the target's other prompt, which only training needs.
    prompts, report = renderer.render(problems, seed=config.run.seed, with_other=False)
    notes.append(f"{name}: {report}")
    return prompts


def read_model_files(
    config: Config, source: Source, ranks: Ranks
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, GenerationConfig | None]:
    """What comes with the weights: the model's config, its tokenizer, its settings of generation. Collective."""

    def read(source: Source) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, GenerationConfig | None]:
        tokenizer = load_tokenizer(source, chat_template=config.model.chat_template)
        return read_config(source), tokenizer, generation_settings(source)

    return asked_once(source, ranks, read)


def generation_settings(source: Source) -> GenerationConfig | None:
    """What the model's folder says of generation, if anything."""
    with suppress(OSError, ValueError):
        return GenerationConfig.from_pretrained(
            source.path, revision=source.revision or "main", local_files_only=source.cached_only
        )
    return None


def training_prompts(
    config: Config, problems: Sequence[Problem], renderer: PromptRenderer, notes: list[str], watch: Watch
) -> PromptStream:
    """The prompts of all steps of the run, and no others; what became of them goes to `notes`."""
    reports: list[PromptReport] = []

    def render(positions: Sequence[int]) -> list[PromptPair | None]:
        pairs, report = renderer.fitting(
            problems, positions, seed=config.run.seed, watch=watch if not reports else ignore
        )
        if not reports:  # what stands in for problems that do not fit comes later, one by one
            report.check(config.prompts)
        reports.append(report)
        return pairs

    places = max(1, config.train.steps) * config.train.problems_per_step
    stream = PromptStream(len(problems), render, seed=config.run.seed, places=places)
    some = "" if places > len(problems) else f" of {len(problems)}, those that {config.train.steps} steps come to"
    notes.append(f"training: {reports[0]}{some}")
    return stream


def ignore(done: int, total: int) -> None:
    """Watch nothing."""
