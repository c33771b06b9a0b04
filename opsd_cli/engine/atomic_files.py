"""Files and folders that appear all at once and survive a crash at any instant: written under another name, forced to
the disk, renamed.

    NAME.part   is being written        NAME.old   has lost its name and is being removed
    NAME.new    a small file about to replace NAME
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from opsd_cli.safety.commit_points import reach

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What is raised when a disk is full: the system's error, torch's, and that of safetensors."""


def part_of(final: Path) -> Path:
    """The name under which `final` is written."""
    return final.with_name(f"{final.name}.part")


def publish(part: Path, final: Path) -> None:
    """Make the folder `part` appear as `final`, on the disk. What stood there before is gone only afterwards."""
    # The content must be on the disk before the name is: a rename may survive a power loss that the content does not.
    for file in sorted(part.rglob("*")):
        if file.is_file():
            sync(file)
            reach("save.synced")
    sync(part)
    # A folder that is not empty cannot be replaced in one call, so the old one is moved aside first.
    old = final.with_name(f"{final.name}.old")
    replaces = final.exists()
    if replaces:
        os.replace(final, old)
    try:
        reach("save.rename")
        os.replace(part, final)
    except OSError:
        if replaces:
            os.replace(old, final)
        raise
    # A new name is an entry of the parent folder, which reaches the disk on its own.
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder so that its name never stands for a part of it."""
    old = folder.with_name(f"{folder.name}.old")
    os.replace(folder, old)
    reach("save.aside")
    shutil.rmtree(old)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what a crash left behind of the folders and small files in `folder` whose names match `pattern`."""
    for leftover in (*folder.glob(f"{pattern}.part"), *folder.glob(f"{pattern}.old")):
        shutil.rmtree(leftover)
    for leftover in folder.glob(f"{pattern}.new"):
        leftover.unlink()


def write_pointer(pointer: Path, name: str) -> None:
    """Make the file `pointer` hold `name`, in one move."""
    new = pointer.with_name(f"{pointer.name}.new")
    write_synced(new, name + "\n")
    reach("save.pointer")
    os.replace(new, pointer)
    sync(pointer.parent)


def describe_file(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def write_synced(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    sync(file)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
