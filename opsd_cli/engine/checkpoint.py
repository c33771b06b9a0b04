"""Checkpoints: how they are committed, checked before use, and pruned. What is inside is written by the engine and the
teacher.

    step_000120.part -> every rank writes -> manifest (who wrote it, files, sizes, sha256) -> fsync
    -> rename to step_000120 -> `latest` replaced

so that a folder named step_* is complete, `latest` names a complete one, and a crash at any point leaves the one before
it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from opsd_cli import __version__
from opsd_cli.engine import atomic_files
from opsd_cli.engine.fingerprint import OF_BYTES
from opsd_cli.engine.process_group import Ranks
from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.errors import DataError, OutsideError
from opsd_cli.settings.resume_rules import MAY_CHANGE, changed_keys, later

Pointer = Literal["latest", "best"]
SCHEMA = 2  # 1 held DeepSpeed's own files
MANIFEST = "manifest.json"
STATE = "state.json"
IN_MANIFEST = ("step", "world_size", "config_hash", "versions", "dataset_fingerprint")
"""What the manifest repeats of the state, for people and programs that look at a checkpoint without loading it."""


class Engine(Protocol):
    """What a checkpoint may ask of the engine."""

    ranks: Ranks

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


class Teacher(Protocol):
    """What a checkpoint may ask of the teacher."""

    def save(self, folder: Path, *, rank: int) -> None: ...
    def load(self, folder: Path, *, rank: int) -> None: ...


@dataclass(frozen=True)
class RunState:
    """Everything a resume needs besides the state of engine and teacher. Order and randomness are functions of (seed,
    step), so one number covers both."""

    step: int  # steps done
    world_size: int
    events_offset: int  # bytes of events.jsonl that belong to these steps
    samples_offset: int
    dataset_fingerprint: str
    model_fingerprint: str
    config_hash: str = ""  # of the settings that make it this run
    identity: Mapping[str, Any] = field(default_factory=dict)  # those settings, by dotted key
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries it was written with
    seconds: float = 0.0  # that the steps took, for train.seconds
    updates: int | None = None  # made in these steps; None: written by a version that did not count them


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, engine: Engine, *, keep_last: int) -> None:
        self.folder, self._engine, self._keep_last = folder, engine, keep_last
        self._ranks = engine.ranks

    def save(
        self,
        step: int,
        teacher: Teacher | None,
        *,
        state: Callable[[], RunState],
        files: Mapping[str, str] = MappingProxyType({}),
    ) -> Path:
        """Publish a checkpoint of step `step`; `state` is called on rank 0 once every rank has written. `files` are
        other texts to keep, by name; empty ones are not. Collective.

        Raises OutsideError on every rank when writing fails on any; the checkpoints before it are untouched.
        """
        final = self._path(step)
        part = atomic_files.part_of(final)
        self._together(lambda: self._create(part, final), "could not be created", final, only=0)
        self._together(lambda: self._write_share(part, teacher, files), "could not be written", final)
        shares = self._together(lambda: self._hash_share(part), "could not be read back", final)
        digests = {name: digest for share in shares for name, digest in share.items()}
        self._together(lambda: self._commit(part, final, state(), digests), "could not be published", final, only=0)
        # Only now: until the new one is committed, the oldest may be the only one left.
        self._together(lambda: self._prune(final), "is complete, but an older one could not be removed", final, only=0)
        return final

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def _create(self, part: Path, final: Path) -> None:
        if final.exists() and not (final / MANIFEST).is_file():
            raise OSError(f"{final} already exists and was not written by opsd (no {MANIFEST}); move it away")
        self._remove_leftovers()
        part.mkdir(parents=True)
        reach("save.folder")

    def _remove_leftovers(self) -> None:
        for pattern in ("step_[0-9]*", "latest", "best"):
            atomic_files.remove_leftovers(self.folder, pattern)

    def _write_share(self, part: Path, teacher: Teacher | None, files: Mapping[str, str]) -> None:
        """This rank's files. The engine's are collective, and end together even if writing fails."""
        self._engine.save(part)
        reach("save.engine")
        if teacher is not None:
            teacher.save(part, rank=self._ranks.rank)
        for name, text in files.items():
            if text and self._ranks.rank == 0:
                (part / name).write_text(text, encoding="utf-8")
        reach("save.teacher")

    def _hash_share(self, part: Path) -> dict[str, Any]:
        """Sizes and digests of this rank's share of the files."""
        # Dealt out by name, not by writer: at stage 0 rank 0 has written nearly everything.
        files = sorted(str(f.relative_to(part)) for f in part.rglob("*") if f.is_file())
        share = files[self._ranks.rank :: self._ranks.world_size]
        return {name: atomic_files.describe_file(part / name) for name in share}

    def _commit(self, part: Path, final: Path, state: RunState, digests: dict[str, Any]) -> None:
        """The order is the promise: the manifest after everything it lists, the name after the manifest is on the disk,
        the pointer after the name. Whatever the last of them was, `latest` names a complete checkpoint."""
        atomic_files.write_synced(part / STATE, json.dumps(asdict(state), indent=1))
        reach("save.state")
        digests[STATE] = atomic_files.describe_file(part / STATE)
        about = {name: vars(state)[name] for name in IN_MANIFEST}
        manifest = {"schema": SCHEMA, "opsd": __version__, **about, "files": digests}
        atomic_files.write_synced(part / MANIFEST, json.dumps(manifest, indent=1))
        reach("save.manifest")
        atomic_files.publish(part, final)
        reach("save.renamed")
        atomic_files.write_pointer(self.folder / "latest", final.name)
        reach("save.pointed")

    def _together(self, work: Callable[[], Any], what: str, final: Path, *, only: int | None = None) -> list[Any]:
        """Do some writing, on every rank or on one, and return what each returned, on rank 0. Fails on every rank if it
        failed on any, leaving nothing unfinished behind."""
        result, problem = None, None
        if only in (None, self._ranks.rank):
            try:
                result = work()
            except atomic_files.WRITE_ERRORS as error:
                problem = f"rank {self._ranks.rank}: {error}"
        # Every rank must learn of a failure here: one that went on would wait in the next collective.
        problem = self._ranks.first_of(problem)
        if problem is None:
            return self._ranks.to_first(result)
        if self._ranks.rank == 0:
            shutil.rmtree(atomic_files.part_of(final), ignore_errors=True)
        self._ranks.barrier()
        newest = self.latest()
        left = f"the newest checkpoint is {newest.name}" if newest else "there is no earlier checkpoint"
        raise OutsideError(f"checkpoint {final} {what} ({problem}); {left}; free some space and resume")

    def latest(self) -> Path | None:
        return latest(self.folder)

    def target_of(self, pointer: Pointer) -> Path | None:
        return target_of(self.folder, pointer)

    def is_published(self, step: int) -> bool:
        return self._path(step) in self.published()

    def published(self) -> list[Path]:
        return published(self.folder)

    def mark_best(self, step: int) -> None:
        """Mark the checkpoint of `step` as the best by held-out accuracy: it is kept whatever comes after."""
        final = self._path(step)

        def point_and_prune() -> None:
            atomic_files.write_pointer(self.folder / "best", final.name)
            self._prune(final)

        self._together(point_and_prune, "could not be marked as the best", final, only=0)

    def tidy(self, loaded: Path) -> None:
        """Finish what a crash interrupted around `loaded`: unfinished files, checkpoints that are not kept."""
        if self._ranks.rank == 0:
            self._remove_leftovers()
            self._prune(loaded)
        self._ranks.barrier()

    def load(self, checkpoint: Path, teacher: Teacher | None) -> RunState:
        """Verify, then load engine and teacher. Collective. Raises DataError naming the damaged file."""
        ranks = self._ranks
        damage = ranks.first_of(damage_of(checkpoint, share=(ranks.rank, ranks.world_size)))
        if damage is not None:
            intact = [path.name for path in self.published() if path != checkpoint and damage_of(path) is None]
            advice = "there is no other complete checkpoint; start the run again under another name"
            if intact:
                advice = f"to use {intact[-1]} instead, write that name into {self.folder / 'latest'} and resume again"
            raise DataError(f"{damage}; {advice}")
        state = RunState(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
        self._engine.load(checkpoint)
        if teacher is not None:
            teacher.load(checkpoint, rank=ranks.rank)
        return state

    def _prune(self, newest: Path) -> None:
        """Keep the last `keep_last` up to `newest`, and the best."""
        best = self.target_of("best")
        # A run that went back to an earlier checkpoint leaves later ones; they do not push out its own.
        for old in [path for path in self.published() if path.name <= newest.name][: -self._keep_last]:
            if old != best:
                atomic_files.remove(old)
                reach("save.pruned")


def latest(folder: Path) -> Path | None:
    """The checkpoint to resume from: the one `latest` names, else the newest published; None without any."""
    return target_of(folder, "latest") or next(reversed(published(folder)), None)


def target_of(folder: Path, pointer: Pointer) -> Path | None:
    """The checkpoint that a pointer file names, if it is there."""
    file = folder / pointer
    name = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    return next((path for path in published(folder) if path.name == name), None)


def published(folder: Path) -> list[Path]:
    """Every complete checkpoint of a run, oldest first. Only folders with our manifest count."""
    return sorted(path for path in folder.glob("step_*") if (path / MANIFEST).is_file() and path.suffix == "")


def damage_of(checkpoint: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint, in words; None if nothing is. A rank checks its share (rank, ranks)."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] > SCHEMA:
            return (
                f"{checkpoint} was written by opsd {manifest.get('opsd', '?')} in schema {manifest['schema']}; this is "
                f"opsd {__version__}, which reads schema {SCHEMA}: use the newer opsd"
            )
        if manifest["schema"] < SCHEMA:
            return (
                f"{checkpoint} was written by an earlier opsd in schema {manifest['schema']} (DeepSpeed's own files); "
                f"this opsd reads schema {SCHEMA}: finish the run with the version that began it"
            )
        files = {name: (expected["bytes"], expected) for name, expected in manifest["files"].items()}
        files[STATE]  # without it there is nothing to continue from: a KeyError like any other
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / MANIFEST} cannot be read: {type(error).__name__}: {error}"
    for name in sorted(files)[share[0] :: share[1]]:
        file, (size, expected) = checkpoint / name, files[name]
        if not file.is_file():
            return f"{file} is missing"
        # Sizes first: a truncated file is the common case, and telling it takes no read.
        if (actual := file.stat().st_size) != size:
            return f"{file} is damaged: {actual} bytes, expected {size}"
        if atomic_files.describe_file(file) != expected:
            return f"{file} is damaged: its sha256 differs from the manifest"
    return None


def refuse_another_run(
    checkpoint: Path,
    was: RunState,
    *,
    data: str,
    model: str,
    identity: Mapping[str, Any],
    versions: Mapping[str, str],
    ranks: int,
) -> list[str]:
    """Raise DataError when data, model (fingerprints) or settings are not those of the checkpoint. Returns what a user
    should know about a resume that goes on: other versions or ranks, a model that could not be compared."""
    notes = []
    if was.world_size != ranks:
        notes.append(
            f"{checkpoint.name} was saved by {was.world_size} ranks and the run goes on with {ranks}: the same run but "
            "for rounding, since sums over ranks are made in another order"
        )
    fingerprints = [("dataset", was.dataset_fingerprint, data), ("model", was.model_fingerprint, model)]
    if not was.model_fingerprint.startswith(OF_BYTES):
        notes.append(
            f"{checkpoint.name} was saved by an opsd that identified models by sums, which differ between machines; "
            "whether model.path still holds the same weights was not checked"
        )
        del fingerprints[1]
    for what, before, now in fingerprints:
        if before != now:
            before, now = (text.removeprefix(OF_BYTES)[:12] for text in (before, now))
            raise DataError(
                f"the {what} has changed since {checkpoint} was saved (fingerprint {before}, now {now}); "
                f"a resumed run must see the same {what}; put it back, or start a new run"
            )
    if changed := changed_keys({**later(was.identity), **was.identity}, identity):
        raise DataError(
            f"config.yaml has changed since {checkpoint} was saved: {', '.join(changed)}; put it back, or start a new "
            f"run (a resume may change only {', '.join(MAY_CHANGE)}, on the command line)"
        )
    if changed := changed_keys(was.versions, versions):
        notes.append(
            f"{checkpoint.name} was saved under other versions: {', '.join(changed)}; numbers may differ a little"
        )
    return notes
