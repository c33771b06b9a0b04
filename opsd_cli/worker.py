"""One rank: `python -m opsd_cli.worker RUN_FOLDER TASK`. Owns the tasks (train, eval, check), what is written into the
run folder while they run, and how a rank ends. Rank 0 writes; the others compute.

    Config -> assembly -> loop.fit -> evaluation -> export -> summary
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch

import opsd_cli.plugins  # noqa: F401
from opsd_cli import summary
from opsd_cli.assembly import (
    Material,
    build_engine,
    build_parts,
    build_policy,
    check_context_length,
    gather_material,
    pick_device,
)
from opsd_cli.engine.checkpoint import CheckpointStore, RunState
from opsd_cli.engine.export import export
from opsd_cli.engine.inference import InferenceEngine
from opsd_cli.engine.policy import fingerprint
from opsd_cli.engine.ranks import Ranks, connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.events import JsonLines
from opsd_cli.insight.evaluation import Engine as EvaluatedEngine
from opsd_cli.insight.evaluation import Role, evaluate
from opsd_cli.loop import Outside, Parts, StepReport, due, fit
from opsd_cli.meters import peak_bytes
from opsd_cli.record import Record, quiet_libraries, sample_lines, versions
from opsd_cli.run_folder import RunFolder, read_config, write_crash, write_error
from opsd_cli.settings.config import Config, typed_config
from opsd_cli.settings.errors import DataError, ExitCode, OpsdError, OutsideError
from opsd_cli.stopping import StopFlag, StopRequested


class Rank:
    """What every task of one rank holds on to."""

    def __init__(self, folder: RunFolder, task: str) -> None:
        self.folder, self.task = folder, task
        self.stop = StopFlag()
        self.stop.listen()
        self.record = Record(folder, is_writer=int(os.environ["RANK"]) == 0)
        self.config: Config = typed_config(read_config(folder))
        self.device = pick_device()
        self.ranks: Ranks = connect(self.device)
        self.step = 0

    def tell(self, phase: str) -> None:
        self.record.progress(phase)

    def evaluate(self, engine: EvaluatedEngine, material: Material, step: int, role: Role) -> None:
        when = {0: "before training", self.config.train.steps: "after training"}.get(step, f"at step {step}")
        phase = f"evaluating {when}" if self.task == "train" else "evaluating"
        phase += "" if role == "student" else ", teacher's prompt"
        total = len(material.eval_prompts)
        evaluation = evaluate(
            engine,
            material.eval_prompts,
            role=role,
            settings=self.config.eval,
            seed=self.config.run.seed,
            grade=material.grade,
            should_stop=self.stop.is_set,
            progress=lambda done: self.record.progress(phase, done=done, total=total),
        )
        self.record.write("evaluation", step=step, **asdict(evaluation))


def train(rank: Rank) -> None:
    """Load, resume if there is a checkpoint, run the steps, evaluate, export, sum up."""
    config, record = rank.config, rank.record
    material = gather_material(config, rank.device, rank.tell, train=True)
    rank.tell("loading the model")
    policy, shadow = build_policy(config, material.source, rank.device)
    model_fingerprint = fingerprint(policy.causal)
    rank.tell("starting DeepSpeed")
    engine = build_engine(config, policy, shadow, rank.ranks, material, rank.device)
    parts = build_parts(config, engine, material, rank.stop.is_set)
    store = CheckpointStore(rank.folder.checkpoints, engine, keep_last=config.checkpoint.keep_last)
    samples = JsonLines(rank.folder.samples) if record.is_writer else None
    rank.step = resume(rank, store, parts, material, model_fingerprint, samples)
    record.write("run_started", **started(rank, engine, material))

    def report(step: int, made: StepReport) -> None:
        rank.step = step
        if samples is not None and due(step, config.samples.every):
            for line in sample_lines(step, made, material, count=config.samples.count):
                samples.append(line)
        record.write("step", step=step, metrics=made.metrics)

    def save(step: int) -> None:
        start = time.perf_counter()

        def state() -> RunState:
            path = f"checkpoints/step_{step:06d}"
            record.write("checkpoint", step=step, path=path, seconds=round(time.perf_counter() - start, 3))
            return RunState(
                step=step,
                world_size=rank.ranks.world_size,
                events_offset=record.offset(),
                samples_offset=samples.offset() if samples is not None else 0,
                dataset_fingerprint=material.splits.fingerprint,
                model_fingerprint=model_fingerprint,
            )

        rank.tell("saving a checkpoint")
        store.save(step, parts.teacher, state=state)

    def measure(step: int) -> None:
        if material.eval_prompts:
            rank.evaluate(engine, material, step, "student")
            if config.eval.teacher_prompt and step in (0, config.train.steps):
                rank.evaluate(engine, material, step, "teacher")

    if rank.step == 0 and config.eval.before:
        measure(0)
    fit(parts, Outside(report=report, evaluate=measure, save=save), start=rank.step)
    if config.train.steps > 0 or not config.eval.before:
        measure(config.train.steps)
    rank.tell("writing the model")
    export(engine, policy, material.source, material.tokenizer, rank.folder.model)
    material.close()


def resume(
    rank: Rank,
    store: CheckpointStore,
    parts: Parts,
    material: Material,
    model_fingerprint: str,
    samples: JsonLines | None,
) -> int:
    """Load the newest checkpoint, if there is one, and take back what was written after it. Returns its step."""
    checkpoint = store.latest()
    if checkpoint is None:
        rank.record.truncate(0)
        if samples is not None:
            samples.truncate(0)
        return 0
    rank.tell(f"loading {checkpoint.name}")
    state = store.load(checkpoint, parts.teacher)
    for what, was, now in (
        ("dataset", state.dataset_fingerprint, material.splits.fingerprint),
        ("model", state.model_fingerprint, model_fingerprint),
    ):
        if was != now:
            raise DataError(
                f"the {what} has changed since {checkpoint} was saved (fingerprint {was[:12]}, now {now[:12]}); "
                f"a resumed run must see the same {what}; put it back, or start a new run"
            )
    rank.record.truncate(state.events_offset)
    if samples is not None:
        samples.truncate(state.samples_offset)
    if store.named_by_pointer() != checkpoint:
        rank.record.write(
            "warning",
            message=f"checkpoints/latest was missing or damaged; resumed from the newest whole one, {checkpoint.name}",
        )
    return state.step


def started(rank: Rank, engine: ZeroEngine, material: Material) -> dict[str, object]:
    """The fields of `run_started`."""
    config = rank.config
    counts = [
        (p.ds_numel if "ds_numel" in p.__dict__ else p.numel(), p.requires_grad) for p in engine.policy.parameters()
    ]
    return {
        **head_fields(rank, material),
        "steps": config.train.steps,
        "start_step": rank.step,
        "problems_per_step": config.train.problems_per_step,
        "rollouts_per_problem": config.train.rollouts_per_problem,
        "parameters": sum(count for count, _ in counts),
        "trainable_parameters": sum(count for count, trained in counts if trained),
    }


def head_fields(rank: Rank, material: Material) -> dict[str, object]:
    """The fields of `run_started` that every task has."""
    return {
        "run": rank.folder.name,
        "task": rank.task,
        "ranks": rank.ranks.world_size,
        "device": torch.cuda.get_device_name(rank.device) if rank.device.type == "cuda" else "cpu",
        "versions": versions(),
        "dataset_fingerprint": material.splits.fingerprint,
        "plan": material.notes,
    }


NO_TRAINING = {
    "steps": 0, "start_step": 0, "problems_per_step": 0, "rollouts_per_problem": 0,
    "parameters": 0, "trainable_parameters": 0,
}  # fmt: skip


def measure_only(rank: Rank) -> None:
    """`opsd eval`: accuracy of a model as it is."""
    config = rank.config
    material = gather_material(config, rank.device, rank.tell, train=False)
    rank.tell("loading the model")
    engine = InferenceEngine(
        material.source, rank.ranks, device=rank.device, pad_id=material.tokenizer.pad_token_id or 0
    )
    check_context_length(config, engine.causal.config.to_dict())
    engine.end_ids = material.renderer.end_ids(engine.causal.generation_config)
    parameters = sum(p.numel() for p in engine.causal.parameters())
    rank.record.write("run_started", **head_fields(rank, material), **NO_TRAINING | {"parameters": parameters})
    rank.evaluate(engine, material, 0, "student")
    if config.eval.teacher_prompt:
        rank.evaluate(engine, material, 0, "teacher")
    material.close()


def check(rank: Rank) -> None:
    """`opsd train --dry-run`: everything but weights and steps; shows one problem under both prompts."""
    material = gather_material(rank.config, rank.device, rank.tell, train=True)
    pair = material.train_prompts[0]
    shown = [
        f"{role} prompt of {pair.problem.id} ({len(ids)} tokens):\n{material.tokenizer.decode(list(ids))}"
        for role, ids in (("student", pair.student_ids), ("teacher", pair.teacher_ids))
    ]
    material.notes.extend([*summary.plan_lines(rank.config, rank.ranks.world_size), *shown])
    rank.record.write("run_started", **head_fields(rank, material), **NO_TRAINING)
    material.close()


TASKS = {"train": train, "eval": measure_only, "check": check}


def run(rank: Rank) -> ExitCode:
    """Carry out the task and say how it ended."""
    try:
        TASKS[rank.task](rank)
    except StopRequested:
        number = max(rank.ranks.gather(rank.stop.signal_number))
        code = ExitCode(128 + number)
        rank.record.ended("stopped", step=rank.step, code=code, message="stopped by a signal")
        return code
    except torch.OutOfMemoryError as error:
        raise OutsideError(out_of_memory(rank, error)) from error
    rank.record.ended("completed", step=rank.step, code=ExitCode.DONE, message="")
    if rank.record.is_writer and rank.task != "check":
        summary.write_summary(rank.folder, peak_gib=peak_bytes(rank.device) / 2**30)
    return ExitCode.DONE


def out_of_memory(rank: Rank, error: Exception) -> str:
    config = rank.config
    return (
        f"out of memory at step {rank.step + 1} ({str(error).splitlines()[0]}); lower train.micro_batch_tokens "
        f"(now {config.train.micro_batch_tokens}), sampling.max_completion_tokens "
        f"(now {config.sampling.max_completion_tokens}) or loss.chunk_mib (now {config.loss.chunk_mib}), or shard "
        f"more: zero=stage3 (now stage {config.zero.stage})"
    )


def main(argv: list[str]) -> int:
    """A rank's whole life. Errors a user can meet become one line in the run folder; bugs a traceback there."""
    folder, number = RunFolder(Path(argv[0])), int(os.environ["RANK"])

    def crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        write_crash(folder, number, "".join(traceback.format_exception(kind, error, trace)))
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = crashed
    warnings.simplefilter("ignore", FutureWarning)
    quiet_libraries()
    rank: Rank | None = None
    try:
        rank = Rank(folder, argv[1])
        code = run(rank)
    except OpsdError as error:
        if rank is not None:
            rank.record.ended("failed", step=rank.step, code=error.exit_code, message=str(error))
        write_error(folder, number, str(error))
        return error.exit_code
    disconnect()
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
