"""The events of a run: the schema of `events.jsonl`, the closed table of metrics, one writer, tolerant readers. Rank 0
writes; the live display, `opsd watch` and sweep tables only read. One line is one event: a JSON object with `kind`,
`time` (unix seconds) and the fields of its kind. JSON has no NaN and no infinity, so a float that is not finite is
written as one of the strings "nan", "inf", "-inf"; `number` reads it back."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsd_cli.safety.commit_points import is_watched, reach
from opsd_cli.safety.secrets import redact
from opsd_cli.safety.terminal import escape_json
from opsd_cli.settings.errors import OutsideError

Event = dict[str, Any]

EVENTS: dict[str, frozenset[str]] = {
    "run_started": frozenset(
        {"run", "task", "steps", "start_step", "problems_per_step", "rollouts_per_problem", "ranks", "device"}
        | {"parameters", "trainable_parameters", "versions", "dataset_fingerprint", "plan"}
    ),
    "progress": frozenset({"phase", "done", "total"}),  # total: 0 if unknown
    "step": frozenset({"step", "metrics"}),
    "evaluation": frozenset(
        {"step", "split", "role", "problems", "correct", "accuracy", "low", "high"}  # low, high: 95 % Wilson
        | {"length_mean", "truncated", "seconds"}
    ),
    "comparison": frozenset(  # of two evaluations of the same problems; name: change or teacher
        {"name", "step", "since", "split", "problems", "won", "lost", "p_value", "gain", "low", "high"}
    ),
    "checkpoint": frozenset({"step", "path", "seconds"}),
    "warning": frozenset({"message"}),
    "run_ended": frozenset({"outcome", "step", "exit_code", "message"}),  # completed, stopped or failed
}
"""Kind -> its fields, beside `kind` and `time`."""

OPTIONAL: dict[str, frozenset[str]] = {
    "run_started": frozenset({"max_seconds", "model_fingerprint"}),  # train.seconds, where it is set; of a training
    "warning": frozenset({"name"}),
    "evaluation": frozenset({"stated", "kl_from_initial", "samples", "at_k", "disagreements"}),
}
"""Fields that an event may lack, as those of earlier versions do. A warning's `name` says which one it is, whatever its
wording: no program may read the message."""

SHAPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("steps", "start_step", "step", "since", "done", "total", "ranks", "exit_code"), int),
    **dict.fromkeys(("problems", "correct", "won", "lost"), int),
    **dict.fromkeys(("accuracy", "low", "high", "stated", "kl_from_initial", "gain", "p_value"), (int, float)),
    **dict.fromkeys(("message", "name", "outcome", "split", "role"), str),
    "metrics": dict,
    "plan": list,
}
"""Types of the fields that readers compute with, split or look into; an event with another type is skipped."""

METRICS: dict[str, str] = {
    "loss/objective": "What is minimised: the chosen divergence, averaged over the step's completion tokens.",
    "kl/forward": "Exact KL(teacher || student) per completion token, in nats, whatever is optimised.",
    "kl/reverse": "Exact KL(student || teacher) per completion token, in nats, whatever is optimised.",
    "entropy/student": "Entropy of the student's next token, mean over completion tokens, in nats.",
    "entropy/teacher": "Entropy of the teacher's next token, mean over completion tokens, in nats.",
    "entropy/gap": "Student's entropy minus the teacher's: where it rises, the student spreads beyond its teacher.",
    "agree/top1": "Share of completion tokens at which student and teacher have the same most likely token.",
    "logprob/student": "Log-probability of a completion token under the student, mean, in nats.",
    "sampler/logprob_gap": "Mean |log p_trainer - log p_sampler| of a sampled token, in nats: rounding, if they agree.",
    "sampler/kl": "Estimate of KL(sampler || trainer) of a sampled token, nats: mean of r - 1 - log r, r = p_t / p_s.",
    "sampler/lag": "Steps that the weights which drew the completions are behind; with sampler.placement=separate.",
    "rollout/length_mean": "Mean length of the completions of the step, in tokens.",
    "rollout/truncated": "Share of completions cut by the length limit; see loss.mask_truncated.",
    "rollout/accuracy": "Share of the step's completions with the right answer, on training problems: noisy.",
    "rollout/empty": "Share of completions without any text: the model ends at once.",
    "rollout/distinct": "Number of different completions of the step divided by the number of completions.",
    "rollout/stated": "Share of the step's completions that state an answer, right or wrong.",
    "rollout/repeated": "Share of completions that repeat themselves: their text compresses more than five-fold.",
    "rollout/leaked": "Share of completions that mention the reference, which the student has never seen.",
    "rollout/bare": "Share of right completions under a quarter of the reference's length: bare answers.",
    "rollout/without_context": "Share of rollouts whose privileged context could not be built: they carry no loss.",
    "rollout/context_too_long": "Share of rollouts whose teacher prompt would be over prompts.max_tokens: no loss.",
    "rollout/context_shortened": "Share of rollouts whose teacher prompt was cut to prompts.max_tokens.",
    "tokens/passed_gate": "Mean factor of the gate of the token rules: the share that passes one of 0 and 1.",
    "tokens/in_prefix": "Share of completion tokens before the entropy that ends a prefix (tokens.prefix_nats).",
    "rollout/written_tokens": "Tokens that the policy wrote about a rollout (context.write), on average.",
    "tokens/importance": "Mean factor min(p_now / p_sampler, loss.importance_cap) of a completion token.",
    "optim/grad_norm": "Norm of the whole gradient before clipping.",
    "optim/update_norm": "Distance in the weights that the step's last update covered; 0 where it was refused.",
    "optim/lr": "Learning rate of this update.",
    "optim/skipped": "Is 1 if the update was refused because the loss or the gradient was not finite, else 0.",
    "optim/loss_scale": "Factor of the loss in the last update; with model.dtype=float16.",
    "optim/overflows": "Updates repeated at half the scale after a gradient overflowed; with model.dtype=float16.",
    "time/sample": "Seconds the step spent drawing completions.",
    "time/write": "Seconds the step spent writing contexts (context.write).",
    "time/score": "Seconds the step spent in the teacher's forward passes.",
    "time/update": "Seconds the step spent in the student's passes and in the optimizer.",
    "time/step": "Seconds of the whole step, bookkeeping included.",
    "tokens/completion": "Completion tokens of the step, over all ranks.",
    "tokens/scored": "Tokens that were scored, prompts included (a shared one once), of all prompts and ranks.",
    "tokens/padding": "Share of padding among the token positions that were scored; 0 where rows are packed.",
    "tokens/per_second": "Completion tokens of the step divided by time/step.",
    "compute/tflop": "Operations (10^12) that the passes of the step need, all ranks: drawing, teacher, student.",
    "compute/gflops_per_second": "Operations (10^9) of compute/tflop that one rank makes in a second of time/step.",
    "compute/repeated": "What gradient checkpointing computed again, as a share of compute/tflop, which leaves it out.",
    "compute/mfu": "Model FLOPs utilisation: compute/gflops_per_second of what a card can do, where that is known.",
    "memory/peak_gib": "Highest memory a rank has used so far, GiB: of its GPU, or resident memory on a CPU.",
}
"""Every metric a step may report, each with the sentence that explains it."""

PROGRESS_SECONDS = 0.5
"""A phase reports at most this often, and always at its first and last item."""


class JsonLines:
    """An append-only file of JSON objects, one per line, each written by one system call so that no reader and no crash
    sees parts of two. Opening it drops an unfinished last line that a dead writer left."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, _complete_lines(self._file))

    def append(self, item: Mapping[str, Any]) -> None:
        """Write one line, without secrets, NaN and infinity. Raises OutsideError if the disk is full."""
        data = json_line(item)
        try:
            if is_watched():
                half = os.write(self._file, data[: len(data) // 2])
                reach("lines.half")
                data = data[half:]
            while data:  # a full disk may take a part before it raises
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise OutsideError(f"cannot write {self.path}: {error.strerror}; free disk space, then resume") from None

    def offset(self) -> int:
        """Bytes written so far. A checkpoint keeps this number, so that a resume can drop the lines after it."""
        return os.fstat(self._file).st_size

    def truncate(self, offset: int) -> None:
        """Drop everything after `offset`, a value of `offset()`. Raises ValueError if the file is shorter."""
        if offset > self.offset():
            raise ValueError(f"{self.path} has {self.offset()} bytes; the checkpoint was saved after {offset}")
        os.ftruncate(self._file, offset)

    def close(self) -> None:
        os.close(self._file)


class EventLog(JsonLines):
    """The writer of `events.jsonl`. Kinds, their fields and metric names are closed: a wrong one is a bug."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._phase, self._phase_time = "", 0.0

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event with the current time."""
        assert kind in EVENTS, f"unknown event kind {kind!r}"
        required = fields.keys() - OPTIONAL.get(kind, frozenset())
        assert required == EVENTS[kind], f"{kind} has fields {sorted(fields)}, not {sorted(EVENTS[kind])}"
        if kind == "step":
            unknown = fields["metrics"].keys() - METRICS.keys()
            assert not unknown, f"metrics {sorted(unknown)} are not in the table"
        self.append({"kind": kind, "time": round(time.time(), 3), **fields})

    def progress(self, phase: str, *, done: int = 0, total: int = 0) -> None:
        """Report the progress of a long phase. Cheap enough for every item: all but the first, the last and one each
        half second are dropped."""
        now = time.monotonic()
        is_edge = phase != self._phase or (total and done >= total)
        if is_edge or now - self._phase_time >= PROGRESS_SECONDS:
            self._phase, self._phase_time = phase, now
            self.write("progress", phase=phase, done=done, total=total)


_TAIL_BYTES = 4096  # an event, its time included


class EventFollower:
    """Reads a growing events file piece by piece. A half-written last line waits for its rest; a line that is not an
    event with all its fields is skipped. If a resumed run has dropped lines, reading starts again from the first."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.rewound = False  # the last poll started over: forget what was read before
        self._offset = 0
        self._tail = b""  # the bytes before the offset: if they have changed, lines were dropped and others written

    def poll(self) -> list[Event]:
        """The events completed since the last call; an empty list if there is no file yet."""
        self.rewound = False
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset - len(self._tail))
                if file.read(len(self._tail)) != self._tail:
                    self.rewound, self._offset, self._tail = True, 0, b""
                    file.seek(0)
                data = file.read()
        except FileNotFoundError:
            return []
        lines = data[: data.rfind(b"\n") + 1]
        self._offset += len(lines)
        self._tail = (self._tail + lines)[-_TAIL_BYTES:]
        return [event for line in lines.splitlines() if (event := parse_event(line)) is not None]


def read_events(path: Path | str) -> list[Event]:
    """Every complete event of a file, in order; an empty list if there is no file."""
    return EventFollower(path).poll()


def number(value: Any) -> float:
    """A float as an event holds it: a JSON number, or "nan", "inf", "-inf"; anything else is NaN."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # JSON numbers have no limit
            return math.inf if value > 0 else -math.inf
    return float(value) if value in ("nan", "inf", "-inf") else math.nan


def json_line(item: Mapping[str, Any]) -> bytes:
    """An object as one line of JSON: without secrets, NaN and infinity, and with every control character escaped."""
    return (escape_json(json.dumps(_plain(item), ensure_ascii=False, allow_nan=False)) + "\n").encode()


def parse_event(line: bytes) -> Event | None:
    """One line as an event; None if it is not one with all its fields."""
    try:
        item = json.loads(line.decode())  # of bytes the encoding would be guessed each time
    except (ValueError, RecursionError):
        return None
    if not isinstance(item, dict) or not isinstance(item.get("time"), (int, float)):
        return None
    kind = str(item.get("kind"))
    if kind not in EVENTS or not EVENTS[kind] <= item.keys():
        return None
    checked = (EVENTS[kind] | OPTIONAL.get(kind, frozenset())) & SHAPES.keys() & item.keys()
    return item if all(isinstance(item[name], SHAPES[name]) for name in checked) else None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return redact(value) if isinstance(value, str) else value


def _complete_lines(file: int) -> int:
    """Bytes of the file up to and including its last newline."""
    for start in reversed(range(0, os.fstat(file).st_size, 65536)):
        newline = os.pread(file, 65536, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
    return 0
