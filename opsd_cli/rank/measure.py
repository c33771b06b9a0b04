"""Measures the weights as they are and records it: the evaluation, each completion, what changed since the first
evaluation, and what the teacher's prompt changes. The files in the run folder are the memory, so that a resumed run
compares with the same first evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from opsd_cli.data.problems import PromptPair, Rollout
from opsd_cli.insight.evaluation import Evaluation, Outcome, Role, evaluate
from opsd_cli.insight.paired import Comparison, compare
from opsd_cli.rank.advice import about_context, about_cut_evaluation, about_unstated_answers
from opsd_cli.rank.context import Rank
from opsd_cli.rank.drift_monitor import Verdict
from opsd_cli.rank.run_data import RunData
from opsd_cli.run.evaluations import (
    Answers,
    append_lines,
    changed_lines,
    changes_file,
    completions_file,
    first_evaluated_step,
    read_completions,
    read_outcomes,
    unfinished_file,
    write_lines,
)
from opsd_cli.sampling.choose_decoder import Completer

RETENTION = "retention"


def measure(
    rank: Rank,
    completer: Completer,
    run_data: RunData,
    prompts: Sequence[PromptPair],
    *,
    role: Role,
    split: str,
    drift: Callable[[Sequence[Rollout]], float] | None = None,
) -> float:
    """Measure, record and return the accuracy. `split` is what the prompts are; `drift` measures the policy along the
    completions, where it can be. Collective."""
    when = f" at step {rank.step}" if rank.task == "train" else ""
    if when and rank.is_at_an_end:
        when = " after training" if rank.step else " before training"
    phase = f"evaluating{when}, {split}" + ("" if role == "student" else ", teacher's prompt")
    rank.heartbeat.enter(phase)
    is_kept = rank.task == "eval"  # so that a measurement that is stopped can go on
    partial_file = unfinished_file(rank.folder, split=split, role=role)
    kept = read_outcomes(partial_file) if is_kept else []
    if is_kept:
        rank.ranks.barrier()  # all have read it before rank 0 adds to it
    evaluation, outcomes, rollouts = evaluate(
        completer,
        prompts,
        role=role,
        split=split,
        settings=rank.config.eval,
        seed=rank.config.run.seed,
        inspect=run_data.inspect_measured,
        should_stop=rank.should_stop,
        progress=lambda done: rank.recorder.progress(phase, done=done, total=len(prompts) * rank.config.eval.samples),
        kept=[Outcome(**line) for line in kept],
        keep=partial(keep, partial_file) if is_kept else None,
    )
    if drift is not None:
        evaluation = replace(evaluation, kl_from_initial=drift(rollouts))
    if rank.recorder.is_writer:
        record(rank, evaluation, outcomes, prompts)
        partial_file.unlink(missing_ok=True)
    return evaluation.accuracy


def record(rank: Rank, evaluation: Evaluation, outcomes: Sequence[Outcome], prompts: Sequence[PromptPair]) -> None:
    """Everything an evaluation leaves in the run folder."""
    split, role = evaluation.split, evaluation.role
    each = [pair.problem for pair in prompts for _ in range(rank.config.eval.samples)]
    lines = [
        {"problem": problem.id, "question": problem.question, "answer": problem.answer} | asdict(outcome)
        for problem, outcome in zip(each, outcomes, strict=True)
    ]
    write_lines(completions_file(rank.folder, step=rank.step, split=split, role=role), lines)
    facts = {name: value for name, value in asdict(evaluation).items() if value is not None}
    rank.recorder.write("evaluation", step=rank.step, **facts)
    if role == "teacher":
        compare_with_student(rank, evaluation)
        return
    first = first_evaluated_step(rank.folder, split=split, role=role)
    if first is not None and first < rank.step:
        compare_with_first(rank, split, first)
    elif split != RETENTION:
        advise(rank, about_cut_evaluation(evaluation, rank.config.eval))
        advise(rank, about_unstated_answers(evaluation))


def keep(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Write down what a measurement has so far."""
    append_lines(file, map(asdict, outcomes))


def compare_with_first(rank: Rank, split: str, since: int) -> None:
    """Which problems the student has won and lost since the first evaluation, with both completions of each."""
    first, last = (completions(rank, step, split, "student") for step in (since, rank.step))
    if comparison := compare(grades(first), grades(last)):
        write_comparison(rank, "change", comparison, split=split, since=since)
        changed = changed_lines(first, last, won=comparison.won, lost=comparison.lost)
        write_lines(changes_file(rank.folder, split=split), changed)


def compare_with_student(rank: Rank, evaluation: Evaluation) -> None:
    """Which problems the teacher's prompt adds and loses, at this step; a warning where it does not help."""
    split, config = evaluation.split, rank.config
    student, teacher = (grades(completions(rank, rank.step, split, role)) for role in ("student", "teacher"))
    if comparison := compare(student, teacher):
        write_comparison(rank, "teacher", comparison, split=split, since=rank.step)
        if rank.step == 0:
            advise(rank, about_context(config, comparison, split=split, teacher=evaluation.accuracy))


def advise(rank: Rank, verdict: Verdict | None) -> None:
    if verdict is not None:
        rank.warn_once(verdict.message, name=verdict.name)


def completions(rank: Rank, step: int, split: str, role: str) -> Answers:
    return read_completions(completions_file(rank.folder, step=step, split=split, role=role))


def grades(answers: Answers) -> dict[str, float]:
    return {problem: answer["share"] for problem, answer in answers.items()}


def write_comparison(rank: Rank, name: str, comparison: Comparison, *, split: str, since: int) -> None:
    facts = asdict(comparison) | {"won": len(comparison.won), "lost": len(comparison.lost)}
    rank.recorder.write("comparison", name=name, step=rank.step, since=since, split=split, **facts)
