"""Checkpoints: what a folder holds, how it appears all at once, how it is checked before use, how many are kept. Owns
the commit; what is inside is written by the engine and the teacher. Knows nothing of signals or of when to save.

    step_000120.part-<pid> -> every rank writes -> barrier -> manifest (files, sizes, sha256) -> fsync
    -> rename to step_000120 -> `latest` replaced

so that a folder named step_* is whole, `latest` names a whole one, and a crash at any point leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from opsd_cli.engine.ranks import Ranks
from opsd_cli.faults import reach
from opsd_cli.method.teacher import Teacher
from opsd_cli.settings.errors import DataError, OutsideError

SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state.json"


class Engine(Protocol):
    """What a checkpoint may ask of the engine."""

    ranks: Ranks

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class RunState:
    """Everything a resume needs beside the engine's and the teacher's own state: order and randomness are functions
    of (seed, step), so one number stands for both."""

    step: int  # updates done
    world_size: int
    events_offset: int  # bytes of events.jsonl that belong to these updates
    samples_offset: int
    dataset_fingerprint: str
    model_fingerprint: str
    schema: int = SCHEMA


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, engine: Engine, *, keep_last: int) -> None:
        self.folder, self._engine, self._keep_last = folder, engine, keep_last
        self._ranks = engine.ranks

    def save(self, step: int, teacher: Teacher | None, *, state: Callable[[], RunState]) -> Path:
        """Publish a checkpoint of step `step`; `state` is called on rank 0 once every rank has written. Collective.

        Raises OutsideError when writing fails on any rank; the checkpoints before it are untouched.
        """
        engine, ranks = self._engine, self._ranks
        final = self.folder / f"step_{step:06d}"
        part = self.folder / f"{final.name}.part"
        if ranks.rank == 0:
            remove_leftovers(self.folder)
            part.mkdir(parents=True)
            reach("save.folder")
        ranks.barrier()
        try:
            engine.save(part)
            reach("save.engine")
            if teacher is not None:
                teacher.save(part, rank=ranks.rank)
            reach("save.teacher")
            problem = None
        except (OSError, RuntimeError) as error:
            problem = f"rank {ranks.rank}: {error}"
        self._agree(problem, "could not be written", final, part)
        digests = self._hash_share(part)
        if ranks.rank == 0:
            try:
                write_synced(part / STATE, json.dumps(asdict(state()), indent=1))
                reach("save.state")
                digests[STATE] = describe_file(part / STATE)
                write_synced(part / MANIFEST, json.dumps({"schema": SCHEMA, "files": digests}, indent=1))
                reach("save.manifest")
                publish(part, final)
                reach("save.pointed")
                self._prune()
            except OSError as error:
                problem = str(error)
        self._agree(problem, "could not be published", final, part)
        return final

    def latest(self) -> Path | None:
        """The checkpoint to resume from: the one `latest` names, else the newest published; None without any."""
        named = self.named_by_pointer()
        published = self.published()
        return named or (published[-1] if published else None)

    def named_by_pointer(self) -> Path | None:
        """What `latest` names, if it is there."""
        return self._named_by("latest")

    def _named_by(self, pointer_name: str) -> Path | None:
        pointer = self.folder / pointer_name
        name = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
        return next((path for path in self.published() if path.name == name), None)

    def published(self) -> list[Path]:
        """Every whole checkpoint, oldest first. Only folders that carry our manifest count."""
        return sorted(path for path in self.folder.glob("step_*") if (path / MANIFEST).is_file() and path.suffix == "")

    def mark_best(self, step: int) -> None:
        """Remember the checkpoint of `step` as the best by held-out accuracy: it is kept whatever comes after."""
        if self._ranks.rank == 0:
            write_pointer(self.folder / "best", f"step_{step:06d}")
            self._prune()
        self._ranks.barrier()

    def best(self) -> Path | None:
        """The checkpoint that was marked best, if it is there."""
        return self._named_by("best")

    def load(self, checkpoint: Path, teacher: Teacher | None) -> RunState:
        """Verify, then load engine and teacher. Collective. Raises DataError naming the damaged file."""
        state = self._verified_state(checkpoint)
        self._engine.load(checkpoint)
        if teacher is not None:
            teacher.load(checkpoint, rank=self._ranks.rank)
        return state

    def _verified_state(self, checkpoint: Path) -> RunState:
        problem = None
        try:
            manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
            if manifest["schema"] > SCHEMA:
                problem = f"{checkpoint} was written by a newer opsd (schema {manifest['schema']}, this is {SCHEMA})"
            else:
                problem = self._damage(checkpoint, manifest["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{checkpoint / MANIFEST} cannot be read: {error}"
        problems = [found for found in self._ranks.gather(problem) if found]
        if problems:
            raise DataError(f"{problems[0]}; {self._other_whole_one(checkpoint)}")
        state = RunState(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
        if state.world_size != self._ranks.world_size:
            raise DataError(
                f"{checkpoint} was saved by {state.world_size} ranks and this run has {self._ranks.world_size}; "
                f"resume with launcher.ranks={state.world_size}"
            )
        return state

    def _damage(self, checkpoint: Path, files: dict[str, Any]) -> str | None:
        """The first damaged file of this rank's share, in words."""
        names = sorted(files)[self._ranks.rank :: self._ranks.world_size]
        for name in names:
            file, expected = checkpoint / name, files[name]
            if not file.is_file():
                return f"{file} is missing"
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{file} is damaged: {size} bytes, expected {expected['bytes']}"
            if describe_file(file) != expected:
                return f"{file} is damaged: its sha256 differs from the manifest"
        return None

    def _other_whole_one(self, damaged: Path) -> str:
        others = [path.name for path in self.published() if path != damaged]
        if not others:
            return "there is no other checkpoint; start the run again under another name"
        return f"to use {others[-1]} instead, write that name into {self.folder / 'latest'} and resume again"

    def _hash_share(self, part: Path) -> dict[str, Any]:
        """Sizes and digests of all files, each rank having read its share."""
        files = sorted(str(f.relative_to(part)) for f in part.rglob("*") if f.is_file())
        share = files[self._ranks.rank :: self._ranks.world_size]
        digests: dict[str, Any] = {}
        for part_of in self._ranks.gather({name: describe_file(part / name) for name in share}):
            digests |= part_of
        return digests

    def _agree(self, problem: str | None, what: str, final: Path, part: Path) -> None:
        """Fail on every rank if one failed, leaving nothing half-written behind."""
        problems = [found for found in self._ranks.gather(problem) if found]
        if not problems:
            return
        if self._ranks.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        before = self.latest()
        kept = f"the newest checkpoint is {before.name}" if before else "there is no earlier checkpoint"
        raise OutsideError(f"checkpoint {final} {what} ({problems[0]}); {kept}; free some space and resume")

    def _prune(self) -> None:
        """Keep the newest `keep_last` and the best."""
        for old in self.published()[: -self._keep_last]:
            if old != self.best():
                discard(old)
                reach("save.pruned")


def publish(part: Path, final: Path) -> None:
    """Make `part` appear as `final` and point `latest` at it, surviving a crash at any point in between."""
    for file in part.rglob("*"):
        if file.is_file():
            sync(file)
            reach("save.synced")
    sync(part)
    reach("save.rename")
    if final.exists():  # a run resumed from an earlier checkpoint saves this step again
        discard(final)
    os.replace(part, final)
    sync(final.parent)
    reach("save.renamed")
    write_pointer(final.parent / "latest", final.name)


def discard(checkpoint: Path) -> None:
    """Remove one of our checkpoints, first from view. A folder without our manifest is somebody else's: OSError."""
    if not (checkpoint / MANIFEST).is_file():
        raise OSError(f"{checkpoint} is in the way and is none of opsd's (no {MANIFEST}); move it")
    leftover = checkpoint.with_name(f"{checkpoint.name}.old.part")
    os.replace(checkpoint, leftover)
    shutil.rmtree(leftover)


def write_pointer(pointer: Path, name: str) -> None:
    """Make a file name one checkpoint, in one move."""
    new = pointer.with_name(f"{pointer.name}.new")
    write_synced(new, name + "\n")
    reach("save.pointer")
    os.replace(new, pointer)
    sync(pointer.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash left half-written."""
    for leftover in folder.glob("step_*.part"):
        shutil.rmtree(leftover)


def describe_file(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with open(file, "rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def write_synced(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    sync(file)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
