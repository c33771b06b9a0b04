"""Checkpoints: whole or absent, checked before use, never overwritten by a failure."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from opsd_cli import __version__
from opsd_cli.engine.checkpoint import SCHEMA, CheckpointStore, RunState, damage_of, refuse_another_run
from opsd_cli.settings.errors import DataError, OutsideError
from opsd_cli.settings.resume_rules import LATER
from opsd_cli.testing import fault_points


class OneRank:
    """The only rank of its group."""

    rank, world_size = 0, 1

    def first_of(self, value):
        return value

    def to_first(self, value):
        return [value]

    def barrier(self) -> None:
        return None


class FilesEngine:
    """Keeps its state in two files, as an engine with shards does."""

    def __init__(self) -> None:
        self.ranks = OneRank()
        self.value = 0
        self.fails = False

    def save(self, folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "a.bin").write_bytes(bytes([self.value]) * 1000)
        if self.fails:
            raise OSError(28, "No space left on device")
        (folder / "engine" / "b.bin").write_bytes(bytes([self.value]) * 10)

    def load(self, folder: Path) -> None:
        self.value = (folder / "engine" / "a.bin").read_bytes()[0]


def state(step: int, world_size: int = 1) -> RunState:
    return RunState(step, world_size, 10 * step, 0, "data", "model")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    made = CheckpointStore(tmp_path / "checkpoints", FilesEngine(), keep_last=2)
    made.folder.mkdir()
    return made


def save(store: CheckpointStore, *steps: int) -> Path:
    for step in steps:
        store._engine.value = step
        last = store.save(step, None, state=lambda step=step: state(step))
    return last


def test_the_newest_is_found_and_loaded(store: CheckpointStore):
    save(store, 1, 2)
    assert store.latest().name == "step_000002"
    store._engine.value = 99
    assert store.load(store.latest(), None) == state(2)
    assert store._engine.value == 2


def test_only_the_last_and_the_best_are_kept(store: CheckpointStore):
    save(store, 1)
    store.mark_best(1)
    save(store, 2, 3, 4)
    assert [path.name for path in store.published()] == ["step_000001", "step_000003", "step_000004"]
    assert store.target_of("best").name == "step_000001"


@pytest.mark.parametrize("damage", ["missing", "empty", "dangling"])
def test_a_damaged_pointer_never_means_starting_again(store: CheckpointStore, damage: str):
    save(store, 1, 2)
    pointer = store.folder / "latest"
    {"missing": pointer.unlink, "empty": lambda: pointer.write_text(""), "dangling": lambda: pointer.write_text("x")}[
        damage
    ]()
    assert store.latest().name == "step_000002"
    assert store.target_of("latest") is None


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "999 bytes, expected 1000"),
        (lambda file: file.write_bytes(b"\x01" + file.read_bytes()[1:]), "sha256 differs"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_a_damaged_file_is_named_with_a_whole_checkpoint_to_use_instead(store: CheckpointStore, harm, words: str):
    save(store, 1, 2)
    harm(store.latest() / "engine" / "a.bin")
    with pytest.raises(DataError, match=f"a.bin.*{words}.*step_000001"):
        store.load(store.latest(), None)


def test_a_write_that_fails_leaves_the_checkpoint_before_it(store: CheckpointStore):
    save(store, 1)
    store._engine.fails = True
    with pytest.raises(OutsideError, match=r"No space left.*newest checkpoint is step_000001"):
        store.save(2, None, state=lambda: state(2))
    assert [path.name for path in store.folder.glob("step_*")] == ["step_000001"]
    assert store.load(store.latest(), None) == state(1)


BEFORE_THE_NAME = ("folder", "engine", "teacher", "state", "manifest", "synced", "rename")


@pytest.fixture
def fault():
    """Arm a fault for the length of a test."""
    yield lambda spec: fault_points.arm({"OPSD_FAULT": spec})
    fault_points.arm({})


@pytest.mark.parametrize("point", [f"save.{step}" for step in BEFORE_THE_NAME])
def test_a_full_disk_at_any_step_of_a_save_leaves_the_checkpoint_before_and_nothing_else(store, fault, point: str):
    save(store, 1)
    fault(f"enospc@{point}:1")
    with pytest.raises(OutsideError, match=r"No space left.*newest checkpoint is step_000001.*and resume"):
        store.save(2, None, state=lambda: state(2))
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_000001"]
    assert store.load(store.latest(), None) == state(1)


def test_a_full_disk_between_the_name_and_the_pointer_leaves_both_checkpoints_whole(store, fault):
    save(store, 1)
    fault("enospc@save.pointer:1")
    with pytest.raises(OutsideError, match="No space left"):
        store.save(2, None, state=lambda: state(2))
    assert store.latest().name == "step_000001"
    assert [damage_of(path) for path in store.published()] == [None, None]
    fault_points.arm({})
    store.tidy(store.latest())
    assert not (store.folder / "latest.new").exists()


def test_a_checkpoint_that_is_being_removed_never_stands_half_under_its_name(store, fault):
    save(store, 1, 2)
    fault("raise@save.aside:1")
    with pytest.raises(OutsideError, match="is complete, but an older one could not be removed"):
        save(store, 3)
    assert [path.name for path in store.published()] == ["step_000002", "step_000003"]
    assert store.latest().name == "step_000003"
    assert (store.folder / "step_000001.old").is_dir()
    fault_points.arm({})
    store.tidy(store.latest())
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_000002", "step_000003"]


def test_a_step_that_is_saved_again_is_there_whatever_happens(store, fault):
    save(store, 1, 2)
    fault("enospc@save.rename:1")
    with pytest.raises(OutsideError, match="No space left"):
        save(store, 2)
    assert store.latest().name == "step_000002"
    assert damage_of(store.latest()) is None


def test_checkpoints_later_than_the_one_a_run_went_back_to_do_not_push_out_its_own(store: CheckpointStore):
    save(store, 1, 5, 6)
    (store.folder / "latest").write_text("step_000001\n")
    save(store, 2, 3)
    assert [path.name for path in store.published()] == ["step_000002", "step_000003", "step_000005", "step_000006"]


def test_only_a_whole_checkpoint_is_offered_instead(store: CheckpointStore):
    save(store, 1, 2)
    for path in store.published():
        (path / "engine" / "a.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"a.bin is damaged.*there is no other complete checkpoint"):
        store.load(store.latest(), None)


def test_the_manifest_says_what_is_needed_to_trust_a_checkpoint(store: CheckpointStore):
    made = RunState(3, 1, 30, 0, "data", "model", config_hash="c0ffee", versions={"torch": "2.13.0"})
    manifest = json.loads((store.save(3, None, state=lambda: made) / "manifest.json").read_text())
    files = manifest.pop("files")
    assert manifest == {
        "schema": SCHEMA, "opsd": __version__, "step": 3, "world_size": 1, "config_hash": "c0ffee",
        "versions": {"torch": "2.13.0"}, "dataset_fingerprint": "data",
    }  # fmt: skip
    assert sorted(files) == ["engine/a.bin", "engine/b.bin", "state.json"]
    assert all(set(entry) == {"bytes", "sha256"} for entry in files.values())
    assert store.load(store.latest(), None) == made


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 2, "files": {}}', '{"schema": "x"}'])
def test_a_damaged_manifest_is_named(store: CheckpointStore, text: str):
    save(store, 1, 2)
    (store.latest() / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"step_000002/manifest.json cannot be read.*step_000001"):
        store.load(store.latest(), None)


def test_leftovers_of_a_crash_are_removed_by_the_next_save(store: CheckpointStore):
    (store.folder / "step_000007.part" / "engine").mkdir(parents=True)
    assert store.latest() is None
    save(store, 8)
    assert not (store.folder / "step_000007.part").exists()


def test_a_folder_that_is_none_of_ours_is_never_removed(store: CheckpointStore):
    (store.folder / "step_000008").mkdir()
    (store.folder / "step_000008" / "thesis.txt").write_text("mine")
    (store.folder / "step_000001_notes").mkdir()
    save(store, 5)
    with pytest.raises(OutsideError, match=r"was not written by opsd.*the newest checkpoint is step_000005"):
        save(store, 8)
    save(store, 9, 10)
    assert (store.folder / "step_000008" / "thesis.txt").read_text() == "mine"
    assert (store.folder / "step_000001_notes").is_dir()
    assert [path.name for path in store.published()] == ["step_000009", "step_000010"]


def test_a_checkpoint_without_a_manifest_does_not_count(store: CheckpointStore):
    save(store, 1)
    (store.folder / "step_000002").mkdir()
    assert store.latest().name == "step_000001"


def test_newer_and_older_schemas_are_refused(store: CheckpointStore):
    save(store, 1)
    save(store, 2)
    manifest = store.latest() / "manifest.json"
    written = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(written | {"schema": 99}))
    with pytest.raises(
        DataError, match=rf"by opsd .* in schema 99; this is opsd {__version__}, .*: use the newer opsd"
    ):
        store.load(store.latest(), None)
    manifest.write_text(json.dumps(written | {"schema": 1}))
    with pytest.raises(DataError, match=r"by an earlier opsd in schema 1 .*: finish the run with the version"):
        store.load(store.latest(), None)


def test_other_ranks_go_on_and_are_told(store: CheckpointStore):
    store.save(2, None, state=lambda: state(2, world_size=4))
    was = store.load(store.latest(), None)
    (note,) = refuse_another_run(
        store.latest(), replace(was, model_fingerprint="bytes:1"), data="data", model="bytes:1", identity=LATER,
        versions={}, ranks=1,
    )  # fmt: skip
    assert "was saved by 4 ranks and the run goes on with 1" in note


def test_saving_the_same_step_again_replaces_it(store: CheckpointStore):
    save(store, 1, 2)
    save(store, 2)
    assert store.load(store.latest(), None) == state(2)
    assert os.listdir(store.folder / "step_000002") == os.listdir(store.latest())
