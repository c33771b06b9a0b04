"""Rendered prompts that are kept: found again, never taken for others, never trusted when damaged."""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prompt_support import TURNS

from opsd_cli.data import prompt_cache
from opsd_cli.data.chat import ChatFormat, Mode

pytest_plugins = ["prompt_support"]

PLAIN = Mode(thinking=False)
QUESTIONS = [f"What is {i} + 1?" for i in range(prompt_cache.FEWEST)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    return tmp_path / "prompts"


def ids_of(tokenizer: Any, *, template: str | None = None, date: str | None = None, **changes: Any) -> list[Any]:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template or own.chat_template
    with closing(ChatFormat(own, system=None, date=date)) as chat:
        return chat.prompt_ids(QUESTIONS, **{"mode": PLAIN, **changes})


@pytest.mark.slow
def test_the_same_prompts_are_rendered_once(tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ids_of(tokenizer)
    (file,) = folder.glob("*.npz")
    monkeypatch.setattr(ChatFormat, "encode", lambda self, texts: pytest.fail("rendered again"))
    monkeypatch.setattr(ChatFormat, "_find_turn_end", lambda self: (1, True))
    assert ids_of(tokenizer) == first
    assert [*folder.iterdir()] == [file]


@pytest.mark.slow
def test_whatever_changes_prompts_gives_them_another_name(tokenizer: Any, folder: Path) -> None:
    ids_of(tokenizer)
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["What is"])
    clock = "{{ strftime_now('%d') }}" + TURNS
    for count, changes in enumerate(
        (
            {"template": TURNS},
            {"mode": Mode(thinking=True)},
            {"mode": Mode(False, (("effort", "low"),))},
            {"systems": ["Be brief."] * len(QUESTIONS)},
            {"template": clock, "date": "2026-01-01"},
            {"template": clock, "date": "2026-01-02"},
        ),
        start=2,
    ):
        ids_of(tokenizer, **changes)
        assert len([*folder.glob("*.npz")]) == count
    ids_of(added)
    assert len([*folder.glob("*.npz")]) == count + 1
    ids_of(tokenizer, template=clock)  # today's date: not the same tomorrow
    ids_of(tokenizer, date="2026-01-03")  # no clock in the template: the date changes nothing
    assert len([*folder.glob("*.npz")]) == count + 1


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": np.array([1, 2], np.int32), "lengths": np.array([3], np.int32)},
        {"ids": np.array([1, 99], np.int32), "lengths": np.array([2], np.int32)},
        {"ids": np.array([1, -1], np.int32), "lengths": np.array([2], np.int32)},
        {"ids": np.array([1.0, 2.0]), "lengths": np.array([2], np.int32)},
        {"ids": np.array([1, 2], np.int32), "lengths": np.array([1, 1], np.int32)},
        {"ids": np.array([1, 2], np.int32)},
        {"ids": np.array([{}], object), "lengths": np.array([1], np.int32)},
    ],
    ids=range(7),
)
def test_a_file_that_does_not_hold_what_it_should_is_not_used(folder: Path, arrays: dict[str, Any]) -> None:
    folder.mkdir()
    np.savez(folder / "key.npz", **arrays)
    assert prompt_cache.load("key", count=1, vocabulary=50) is None
    prompt_cache.save("key", [(1, 2)])
    assert prompt_cache.load("key", count=1, vocabulary=50) == [(1, 2)]
    (folder / "key.npz").write_bytes(b"PK\x03\x04")
    assert prompt_cache.load("key", count=1, vocabulary=50) is None


def test_a_folder_that_cannot_be_written_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.joinpath("file").write_text("")
    monkeypatch.setenv("OPSD_CACHE", str(folder.parent / "file"))
    prompt_cache.save("key", [(1, 2)])
    assert prompt_cache.load("key", count=1, vocabulary=50) is None


def test_the_oldest_files_go_when_there_is_too_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_cache.save("a", [(1,)])
    (file,) = folder.iterdir()
    monkeypatch.setattr(prompt_cache, "MOST_BYTES", 2 * file.stat().st_size)
    for name in "bc":
        prompt_cache.save(name, [(1,)])
    assert len([*folder.iterdir()]) == 2
