"""The process of one rank: `python -m opsd_cli.rank RUN_FOLDER TASK [PLUGIN ...]`. The tasks that do not train
(eval, check) and how a rank ends: its exit code, the one line or the traceback it leaves. Rank 0 writes; the others
compute.

    config -> build -> training.loop.fit -> evaluation -> export -> summary
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType

import opsd_cli.plugins  # noqa: F401
from opsd_cli.cpu.allocator import keep_freed_memory
from opsd_cli.engine.loading import asked_once
from opsd_cli.engine.model_limits import check_same_tokens
from opsd_cli.engine.process_group import disconnect, lost_connection
from opsd_cli.engine.zero_config import effective_stage
from opsd_cli.insight.evaluation import Role
from opsd_cli.rank.build import build_completer, load_trained
from opsd_cli.rank.context import Rank
from opsd_cli.rank.measure import measure
from opsd_cli.rank.plan import loss_line, predicted_line
from opsd_cli.rank.recorder import quiet_libraries
from opsd_cli.rank.run import train
from opsd_cli.run import summary
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.plugin_copies import recorded_plugins
from opsd_cli.run.rank_errors import write_crash, write_error
from opsd_cli.safety.secrets import redact_output
from opsd_cli.sampling.vllm import close_engines
from opsd_cli.settings.errors import ExitCode, LostRankError, OpsdError, OutsideError
from opsd_cli.settings.memory_errors import is_out_of_memory, shortage_of
from opsd_cli.settings.plugin_files import plugin_faults, use_copies
from opsd_cli.teachers.teachers import External
from opsd_cli.training.clock import peak_bytes
from opsd_cli.training.interruptions import StopRequested, explain_out_of_memory

FAULTS = "OPSD_FAULT"  # set by tests only: the rank fails on purpose (`opsd_cli.testing`)


def measure_only(rank: Rank) -> None:
    """`opsd eval`: accuracy of a model as it is."""
    run_data = rank.load_data(train=False)
    rank.report_phase("loading the model")
    model = asked_once(run_data.source, rank.ranks, partial(load_trained, rank.config, device=rank.device))
    completer = build_completer(model, rank.ranks, run_data, model.causal, rank.warn)
    run_data.notes.append(f"completions: {completer.choose_decoder()}")
    rank.record_start(run_data, parameters=sum(p.numel() for p in model.causal.parameters()))
    roles: tuple[Role, ...] = ("student", "teacher") if rank.config.eval.teacher_prompt else ("student",)
    for role in roles:
        measure(rank, completer, run_data, run_data.eval_prompts, role=role, split=rank.config.eval.split)
    run_data.close()


def check(rank: Rank) -> None:
    """`opsd train --dry-run`: everything but weights and steps; shows one problem under both prompts."""
    run_data = rank.load_data(train=True)
    teacher = rank.config.teacher
    if isinstance(teacher, External) and teacher.path is not None:
        check_same_tokens(run_data.source.beside(teacher.path, teacher.revision), run_data.source)
    pair = run_data.train_prompts.rendered[0]
    shown = [
        f"{role} prompt of {pair.problem.id} ({len(ids)} tokens):\n{run_data.tokenizer.decode(list(ids))}"
        for role, ids in (("student", pair.student_ids), ("teacher", pair.teacher_ids))
    ]
    stage = effective_stage(rank.config.zero, run_data.source.dtype, ranks=rank.ranks.world_size)
    plan = [*summary.plan_lines(rank.config, rank.ranks.world_size, stage=stage), loss_line(rank.config, rank.device)]
    plan += predicted_line(rank.config, run_data, ranks=rank.ranks.world_size, device=rank.device)
    run_data.notes.extend([*plan, *shown])
    rank.record_start(run_data)
    run_data.close()


TASKS = {"train": train, "eval": measure_only, "check": check}


def run(rank: Rank) -> ExitCode:
    """Carry out the task and say how it ended."""
    try:
        TASKS[rank.task](rank)
    except StopRequested:
        number = max(rank.ranks.gather(rank.stop.signal_number))
        code = ExitCode(128 + number)
        rank.recorder.ended("stopped", step=rank.step, code=code, message="stopped by a signal")
        return code
    except (RuntimeError, MemoryError, OSError) as error:
        if rank.ranks.world_size > 1 and (line := lost_connection(error)):
            raise LostRankError(
                f"lost the connection to another rank: {line}; its own log or machine says why, then resume"
            ) from error
        if not is_out_of_memory(error):
            raise
        ranks, on_gpu = rank.ranks.world_size, rank.device.type == "cuda"
        message = explain_out_of_memory(error, rank.config, step=rank.step + 1, ranks=ranks, on_gpu=on_gpu)
        raise OutsideError(message) from error
    if rank.recorder.is_writer and rank.task != "check":
        summary.write_summary(rank.folder, peak_gib=peak_bytes(rank.device) / 2**30)
    rank.recorder.ended("completed", step=rank.step, code=ExitCode.DONE, message="")  # the last word: all else is there
    return ExitCode.DONE


def start_rank(folder: RunFolder, task: str) -> Rank:
    """This rank, in touch with the others. Raises OutsideError where they cannot be reached, or the device has no room
    even for that."""
    try:
        return Rank(folder, task)
    except (RuntimeError, MemoryError, OSError) as error:
        if line := lost_connection(error):
            raise OutsideError(
                f"cannot meet the other ranks at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                f"({line}); on machines with several networks GLOO_SOCKET_IFNAME names the one to use, "
                "and NCCL_SOCKET_IFNAME under NCCL"
            ) from error
        if (shortage := shortage_of(error)) is None:
            raise
        raise OutsideError(
            f"out of memory before anything was loaded ({shortage.line}); see what else runs there (nvidia-smi), and "
            "try again"
        ) from error


def leave_error(folder: RunFolder, number: int, rank: Rank | None, error: OpsdError) -> None:
    """Write why the rank ends to the events, to its error file and to its log; a full disk may refuse any of them."""
    is_consequence = isinstance(error, LostRankError)
    if rank is not None and not is_consequence:  # the cause is recorded by whoever knows it
        with contextlib.suppress(OutsideError):
            rank.recorder.ended("failed", step=rank.step, code=error.exit_code, message=str(error))
    with contextlib.suppress(OutsideError):
        write_error(folder, number, str(error), exit_code=error.exit_code, is_consequence=is_consequence)
    with contextlib.suppress(OSError):
        print(error, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Run one rank and return its exit code. Errors a user can meet become one line in the run folder; bugs leave a
    traceback there."""
    folder, number = RunFolder(Path(argv[0])), int(os.environ["RANK"])

    def crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        write_crash(folder, number, "".join(traceback.format_exception(kind, error, trace)))
        sys.__excepthook__(kind, error, trace)

    keep_freed_memory()
    redact_output()
    sys.excepthook = crashed
    warnings.simplefilter("ignore", FutureWarning)
    quiet_libraries()
    rank: Rank | None = None
    try:
        if FAULTS in os.environ:
            import_module("opsd_cli.testing.fault_points").arm(os.environ)
        use_copies(folder.plugins, argv[2:], typed=recorded_plugins(folder))
        with plugin_faults():
            rank = start_rank(folder, argv[1])
            code = run(rank)
    except OpsdError as error:
        leave_error(folder, number, rank, error)
        return error.exit_code
    close_engines()
    disconnect()
    return code
