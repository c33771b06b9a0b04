"""Whether the data and the model's config are fit for a run, before anything is rendered or loaded: columns, answers,
lengths, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from opsd_cli.data.contexts import Context, second_view
from opsd_cli.data.problems import Problem, PromptPair, Splits
from opsd_cli.data.prompts import PromptRenderer
from opsd_cli.engine.model_limits import has_unknown_tokens, longest_completion, longest_row, unknown_token
from opsd_cli.engine.process_group import Ranks
from opsd_cli.loss.routed import Routed
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, DataError
from opsd_cli.settings.registry import ShowsColumns

GRADE = "name their column with dataset.answer_field"


def shown_columns(config: Config) -> tuple[str, ...]:
    """The columns of the data that a prompt shows, under the context or under a second view of it."""
    views = (Context(config.context), second_view(config.context, config.target.view))
    return tuple(sorted({name for view in views if view is not None for name in view.columns}))


def load_splits(config: Config, columns: tuple[str, ...]) -> Splits:
    """The dataset, with the columns that the context shows. Raises DataError where its problems have none of a name."""
    dataset: Any = config.dataset
    reads = bool(columns) and isinstance(dataset, ShowsColumns)
    splits: Splits = dataset.load_showing(columns) if reads else dataset.load()
    for problem in (*splits.train, *splits.validation, *splits.test, *splits.retention):
        held = dict(problem.columns)
        if missing := [name for name in columns if name not in held]:
            raise DataError(
                f"context={config.context.name} shows {{{{row.{missing[0]}}}}}, and problem {problem.id} of "
                f"dataset={config.dataset.plugin_name} has no such column (columns there are: "
                f"{', '.join(held) or 'none'})"
            )
    return splits


def read_splits(config: Config, ranks: Ranks) -> Splits:
    """The dataset, read (and asked for, where it is on the hub) by one rank of each node. Raises DataError on every
    rank where the nodes have not read the same. Collective."""
    splits = ranks.node.once(partial(load_splits, config, shown_columns(config)))
    wanted = ranks.from_first(splits.fingerprint)
    differs = f"{splits.source} is not the data that rank 0 has read (fingerprint {splits.fingerprint[:12]}, there "
    if problem := ranks.refusal("" if splits.fingerprint == wanted else f"{differs}{wanted[:12]})"):
        raise DataError(f"{problem}; give every machine the same files, or pin dataset.revision to a commit")
    return splits


def check_row_length(config: Config, model: PreTrainedConfig) -> None:
    """Prompt and completion together must fit what the model was made for."""
    limit = longest_completion(config)
    longest = longest_row(model)
    if longest is not None and config.prompts.max_tokens + limit > longest[0]:
        raise ConfigError(
            f"prompts.max_tokens is {config.prompts.max_tokens} and completions may have {limit} tokens, but "
            f"{longest[1]}; lower sampling.max_completion_tokens, eval.max_completion_tokens or prompts.max_tokens"
        )


def graded_problems(config: Config, splits: Splits, notes: list[str], *, train: bool) -> tuple[Problem, ...]:
    """The held-out problems, none where they have no answers; `notes` says so. Raises DataError where nothing but
    grading was asked for."""
    held_out = held_out_problems(config, splits)
    if has_answers(held_out):
        return held_out
    if not train:
        raise DataError(f"the {config.eval.split} problems of {splits.source} have no answers to grade; {GRADE}")
    notes += [f"no accuracy: the {config.eval.split} problems have no answers; {GRADE}"] if held_out else []
    return ()


def held_out_problems(config: Config, splits: Splits) -> tuple[Problem, ...]:
    """The first `eval.problems` of the chosen split."""
    problems: tuple[Problem, ...] = {"validation": splits.validation, "test": splits.test}[config.eval.split]
    if config.eval.problems and not problems:
        raise DataError(
            f"eval.split={config.eval.split} is empty in {splits.source}; set eval.problems=0 to train without "
            f"evaluation, or dataset.{config.eval.split}_problems to take some from the training problems"
        )
    return problems[: config.eval.problems]


def has_answers(problems: Sequence[Problem]) -> bool:
    """Whether there is something to grade: either all problems of a split have answers or none has."""
    return any(problem.answer is not None for problem in problems)


def check_answers(config: Config, splits: Splits, *, train: bool) -> bool:
    """Whether training is graded. Raises DataError where it must be, and there is nothing to grade against."""
    if not train or has_answers(splits.train):
        return train
    context, divergence = Context(config.context), config.divergence
    by_reference = context.verdicts == "reference"
    view = second_view(config.context, config.target.view)
    held = context.teacher_placeholders | (set() if view is None else view.teacher_placeholders)
    held |= set() if context.write is None else context.write.placeholders
    needs = {
        f"tokens.keep={config.tokens.keep}": config.tokens.keep != "all" and by_reference,
        "divergence.by=right_answer": isinstance(divergence, Routed)
        and divergence.by == "right_answer"
        and by_reference,
        "tokens.gate=right_answer": config.tokens.gate == "right_answer" and by_reference,
        "tokens.prefix_of=wrong": config.tokens.prefix_of == "wrong" and by_reference,
        "tokens.pass_powers": any(config.tokens.pass_powers) and by_reference,
        f"context={context.name}, which shows correct rollouts,": context.needs_answers,
        f"context={context.name}, which shows {{{{answer}}}},": "answer" in held,
        f"context.control={context.control}": context.control in ("wrong", "all_but_last"),
    }
    if wanting := [name for name, is_needed in needs.items() if is_needed]:
        raise DataError(f"{splits.source}: {wanting[0]} needs answers, and the data have none; {GRADE}")
    return False


def check_tokens(model: PreTrainedConfig, renderer: PromptRenderer, pairs: list[PromptPair]) -> None:
    """Every token that the model will be given must be in its table."""
    tokenizer = renderer.chat.tokenizer
    if not has_unknown_tokens(model, tokenizer):
        return
    prompts = (ids for pair in pairs for ids in (pair.student_ids, pair.teacher_ids, pair.other_ids))
    solutions = renderer.chat.encode([pair.problem.solution for pair in pairs])
    unknown = unknown_token(model, tokenizer, [*prompts, *solutions])
    if unknown:
        raise DataError(
            f"{unknown}; use another chat template (model.chat_template=FILE), leave the token out of the data, or "
            "resize the model's embeddings (resize_token_embeddings) before you train it"
        )
