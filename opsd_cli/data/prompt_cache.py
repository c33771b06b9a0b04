"""Rendered prompts, kept in the user's cache folder: the same conversations under the same template and tokenizer are
token ids that need not be made again. Plain numbers, named by a fingerprint of everything that they depend on; a file
that does not hold what its name promises is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

FORMAT = 1  # of the files, and of how prompts are made
FEWEST = 256  # prompts worth keeping
MOST_BYTES = 2 * 2**30  # of all files together: prompts of a million problems


def cache_folder() -> Path:
    """Where rendered prompts are kept: in OPSD_CACHE, or the user's cache folder."""
    own, base = os.environ.get("OPSD_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    user = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return (Path(own) if own else user / "opsd") / "prompts"


def tokenizer_print(tokenizer: Any) -> str:
    """A fingerprint of what a fast tokenizer makes of any text; empty for one whose state cannot be seen."""
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is None:
        return ""
    digest = hashlib.sha256(backend.to_str().encode())
    digest.update(json.dumps([repr(tokenizer.special_tokens_map), len(tokenizer)]).encode())
    return digest.hexdigest()


def key_of(facts: Sequence[Any]) -> str:
    """The name of a file: a fingerprint of everything that its prompts depend on."""
    digest = hashlib.sha256()
    for fact in (FORMAT, version("transformers"), version("tokenizers"), *facts):
        digest.update(json.dumps(fact, sort_keys=True).encode() + b"\0")
    return digest.hexdigest()


def load(key: str, *, count: int, vocabulary: int) -> list[tuple[int, ...]] | None:
    """The `count` prompts that were kept under a key, or None: there are none, or not such ones. What is used is kept
    longest."""
    path = cache_folder() / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, lengths = file["ids"], file["lengths"]
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, BadZipFile):
        return None
    well_formed = ids.dtype == np.int32 and lengths.dtype == np.int32 and ids.ndim == lengths.ndim == 1
    if not well_formed or len(lengths) != count or lengths.min(initial=1) < 1 or lengths.sum() != len(ids):
        return None
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocabulary:
        return None
    with contextlib.suppress(OSError):  # a folder that can only be read
        os.utime(path)
    ends = list(accumulate(lengths.tolist()))
    flat = ids.tolist()
    return [tuple(flat[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)]


def save(key: str, prompts: Sequence[Sequence[int]]) -> None:
    """Keep prompts under a key, if the folder can be written; what is oldest goes when there is too much."""
    ids = np.fromiter((i for prompt in prompts for i in prompt), dtype=np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    if ids.nbytes > MOST_BYTES:
        return
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "made.npz"
            np.savez(made, ids=ids, lengths=lengths)
            os.replace(made, folder / f"{key}.npz")
        total = 0
        for file in sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True):
            total += file.stat().st_size
            if total > MOST_BYTES:
                file.unlink(missing_ok=True)
