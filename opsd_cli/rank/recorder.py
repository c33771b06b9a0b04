"""What one rank puts into the run folder while it works: events and samples (rank 0 only), and the rollouts that an
update was refused for.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opsd_cli import __version__
from opsd_cli.rank.run_data import RunData
from opsd_cli.run.events import EventLog, JsonLines
from opsd_cli.run.folder import RunFolder
from opsd_cli.training.step_report import Sample, StepReport

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a character whose bytes are spread over several tokens
_WINDOW = 8  # tokens that are decoded again before the newest: enough for any character and any joining of words


class Recorder:
    """The event log on rank 0, nothing elsewhere."""

    def __init__(self, folder: RunFolder, *, is_writer: bool) -> None:
        self.is_writer = is_writer
        self._log = EventLog(folder.events) if is_writer else None

    def write(self, kind: str, **fields: Any) -> None:
        if self._log is not None:
            self._log.write(kind, **fields)

    def progress(self, phase: str, *, done: int = 0, total: int = 0) -> None:
        if self._log is not None:
            self._log.progress(phase, done=done, total=total)

    def ended(self, outcome: str, *, step: int, code: int, message: str) -> None:
        self.write("run_ended", outcome=outcome, step=step, exit_code=int(code), message=message)

    def offset(self) -> int:
        return 0 if self._log is None else self._log.offset()

    def truncate(self, offset: int) -> None:
        if self._log is not None:
            self._log.truncate(offset)


def sample_lines(step: int, samples: Sequence[Sample], run_data: RunData) -> Iterator[dict[str, Any]]:
    """Samples as lines of samples.jsonl: text for people, ids and numbers for programs."""
    grades = run_data.inspect([sample.rollout for sample in samples]).correct
    for sample, correct in zip(samples, grades, strict=True):
        rollout, problem, ids = sample.rollout, sample.rollout.prompt.problem, list(sample.rollout.completion_ids)
        yield {
            "step": step,
            "problem": problem.id,
            "prompt": run_data.tokenizer.decode(list(rollout.prompt.student_ids)),
            "teacher_prompt": run_data.tokenizer.decode(list(rollout.prompt.teacher_ids)),
            "completion": run_data.tokenizer.decode(ids),
            "completion_ids": ids,
            "pieces": token_pieces(ids, run_data.tokenizer.decode),
            "finish_reason": rollout.finish_reason,
            "answer": problem.answer,
            "reward": float(correct) if problem.accepted else None,
            "divergence": [round(value, 5) for value in sample.token_losses],
        }


def token_pieces(ids: Sequence[int], decode: Callable[[list[int]], Any]) -> list[str]:
    """The text that each token adds; together they are the decoded completion. A character that several tokens make
    stands at the last of them, and the others have an empty piece."""
    pieces: list[str] = []
    start, shown = 0, 0  # of the window; tokens whose text has been given out
    for end in range(1, len(ids) + 1):
        before = decode(list(ids[start:shown]))
        text = decode(list(ids[start:end]))
        if text.endswith(_UNFINISHED) and end < len(ids) and end - shown < _WINDOW:
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        shown = end
        start = max(start, end - _WINDOW)
    return pieces


def write_suspects(folder: RunFolder, step: int, report: StepReport, *, rank: int) -> Path:
    """The rollouts that a number which is not finite may come from, one a line, with what each token cost."""
    file = folder.nonfinite / f"step_{step:06d}_rank{rank}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)  # of an attempt that went through this step before
    lines = JsonLines(file)
    for rollout in report.suspects:
        lines.append(
            {
                "step": step,
                "refused": report.refused,
                "problem": rollout.prompt.problem.id,
                "student_prompt_ids": rollout.prompt.student_ids,
                "teacher_prompt_ids": rollout.prompt.teacher_ids,
                "completion_ids": rollout.completion_ids,
                "finish_reason": rollout.finish_reason,
                "divergence": report.token_losses.get(rollout.key, []),
            }
        )
    lines.close()
    return file


def versions() -> dict[str, str]:
    """What a result depends on beside the config."""
    libraries = ("torch", "transformers", "deepspeed", "peft", "datasets", "hydra-core")
    own = {"opsd": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in libraries}


def quiet_libraries() -> None:
    """Keep progress bars and advice of libraries out of a rank's log, which is shown when it fails."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
