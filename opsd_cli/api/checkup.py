"""A recipe looked at on its real data and model, up to one step, before a run is started: `opsd doctor`. It calls the
checks that a run makes, goes on where a run would stop, and looks at what no run has time for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from opsd_cli.api.prompt_checkup import MOST_RENDERED, look_at_chat, look_at_prompts
from opsd_cli.api.trial import try_out
from opsd_cli.data.contexts import Context
from opsd_cli.data.problems import Problem, Splits
from opsd_cli.data.references import check_references
from opsd_cli.engine.device import card_of, choose_dtype
from opsd_cli.engine.loading import Source, find_source, load_causal, read_config
from opsd_cli.insight.duplicates import look_for_duplicates
from opsd_cli.insight.findings import Findings, Level
from opsd_cli.rank.data_checks import (
    check_answers,
    check_row_length,
    held_out_problems,
    load_splits,
    shown_columns,
)
from opsd_cli.rank.recorder import quiet_libraries
from opsd_cli.settings.config import Config

Tell = Callable[[str], None]

ALL_BUT_ALL = 0.99  # share of bad rows among which good ones are looked for
FEW_AGREE = 0.5  # share of references, below which no accuracy means anything


def look_at_recipe(findings: Findings, config: Config, *, device: torch.device, tell: Tell) -> None:
    """Note what is found of data, model, prompts, teacher and a first step. `tell` hears which long part begins."""
    quiet_libraries()
    tell("reading the data")
    splits = _data(findings, config)
    tell("reading the model's files")
    source, model_config = _files(findings, config, device)
    renderer = look_at_chat(findings, config, source, model_config) if source is not None else None
    if source is not None and renderer is not None and splits is not None:
        tell("rendering prompts")
        look_at_prompts(findings, config, splits, renderer, source, model_config)
    if source is not None:
        tell("loading the weights")
        if _weights(findings, source, device) and not findings.count("error"):
            try_out(findings, config, device, tell)
        elif findings.count("error"):
            findings.add("run", "trial", "warning", "no step was tried, because of the errors above", "mend them first")
    if renderer is not None:
        renderer.close()


def _data(findings: Findings, config: Config) -> Splits | None:
    splits = findings.attempt("data", "read", lambda: load_splits(config, shown_columns(config)))
    if splits is None and "max_bad_share" in vars(config.dataset):
        # What can be read of it is looked at all the same.
        lenient = replace(config, dataset=replace(config.dataset, max_bad_share=ALL_BUT_ALL))
        splits = Findings().attempt("data", "read", lambda: load_splits(lenient, shown_columns(config)))
    if splits is None:
        return None
    sizes = {name: len(vars(splits)[name]) for name in ("train", "validation", "test", "retention")}
    listed = ", ".join(f"{count:,} {name}" for name, count in sizes.items() if count)
    findings.add("data", "read", "ok", f"{splits.source}: {listed} problems")
    for line in splits.left_out:
        findings.add("data", "left_out", "warning", line, "mend these rows, or leave them out of the file")
    findings.attempt("data", "answers", lambda: check_answers(config, splits, train=True))
    held_out = findings.attempt("data", "held_out", lambda: held_out_problems(config, splits)) or ()
    _references(findings, config, [*splits.train[:MOST_RENDERED], *held_out])
    look_for_duplicates(findings, splits)
    return splits


def _references(findings: Findings, config: Config, problems: Sequence[Problem]) -> None:
    unanswered = sum(problem.answer is None for problem in problems)
    if unanswered:
        message = f"{unanswered:,} of {len(problems):,} problems have no answer, and no completion of them is graded"
        findings.add("data", "no_answer", "warning", message, "name their column with dataset.answer_field")
    bare = sum(not problem.solution.strip() for problem in problems)
    shows = "solution" in Context(config.context).teacher_placeholders
    if bare and shows:
        message = f"{bare:,} of {len(problems):,} problems have no reference solution to show to the teacher"
        findings.add("data", "no_solution", "warning", message, "set dataset.solution_field, or context=answer_only")
    grader = config.grader.build()
    try:
        report = check_references(grader, problems)
    finally:
        grader.close()
    if not report.graded:
        return
    if report.warning is None:
        findings.add("data", "references", "ok", str(report))
    else:
        level: Level = "error" if report.right < FEW_AGREE * report.graded else "warning"
        findings.add("data", "references", level, report.warning)


def _files(findings: Findings, config: Config, device: torch.device) -> tuple[Source | None, Any]:
    dtype = findings.attempt("model", "dtype", lambda: choose_dtype(config.model.dtype, [card_of(device)])[0])
    if dtype is None:
        return None, None
    source = findings.attempt("model", "files", lambda: find_source(config.model, dtype=dtype, tell=lambda line: None))
    if source is None:
        return None, None
    model_config = findings.attempt("model", "config", lambda: read_config(source))
    if model_config is None:
        return None, None
    findings.attempt("model", "positions", lambda: check_row_length(config, model_config))
    return source, model_config


def _weights(findings: Findings, source: Source, device: torch.device) -> bool:
    lines = list[str]()
    causal = findings.attempt("model", "weights", lambda: load_causal(source, device=device, told=lines.append))
    if causal is None:
        return False
    findings.add("model", "weights", "ok", lines[-1])
    return True
