"""Tensors by name, each in pieces over the files of several ranks, as safetensors: written in one layout of ranks and
ZeRO stage and read in any other. A piece says where it lies in the flat tensor, so a reader takes just what it needs.

    weights_00000.safetensors    what rank 0 wrote: one piece of some tensors, each under its tensor's name, flat
        __metadata__.pieces      {"layers.0.weight": {"shape": [256, 64], "start": 8192, "dtype": "bfloat16"}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opsd_cli.engine.device import DTYPES
from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.errors import DataError

PIECES = "pieces"


@dataclass(frozen=True)
class Piece:
    """Entries `start` and following of the tensor `name` of this shape, flattened in rows."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor  # flat
    dtype: torch.dtype  # in which the tensor is used; the values may be wider

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    def share(self, rank: int, ranks: int) -> Piece:
        """The part that one of several ranks writes of a piece that all of them hold."""
        size = self.values.numel()
        first, last = size * rank // ranks, size * (rank + 1) // ranks
        return Piece(self.name, self.shape, self.start + first, self.values[first:last], self.dtype)


def write_pieces(file: Path, pieces: Iterable[Piece]) -> None:
    """Write this rank's file; a rank without entries writes an empty one. `kind_RANK.safetensors` is its name, of
    `shard_file`."""
    reach("save.file")
    held = [piece for piece in pieces if piece.values.numel()]
    about = {
        piece.name: {"shape": piece.shape, "start": piece.start, "dtype": str(piece.dtype).removeprefix("torch.")}
        for piece in held
    }
    tensors = {piece.name: piece.values.detach().cpu().contiguous() for piece in held}
    save_file(tensors, file, metadata={PIECES: json.dumps(about)})


def shard_file(folder: Path, kind: str, rank: int) -> Path:
    return folder / f"{kind}_{rank:05d}.safetensors"


class Stored(NamedTuple):
    """Where a piece lies: entries `start` to `stop` of a tensor, in the file of that number."""

    start: int
    stop: int
    file: int


class TensorShards:
    """The tensors of one kind in a folder, whoever wrote them. A context manager: files are open while it is.

    Raises DataError where there are none, where a file is damaged, or where entries of a tensor are in no file."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self._stack = ExitStack()
        self._files: list[Any] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._pieces: dict[str, list[Stored]] = {}
        paths = sorted(folder.glob(f"{kind}_[0-9]*.safetensors"))
        if not paths:
            raise DataError(
                f"{folder} holds no {kind}_*.safetensors; the checkpoint is incomplete, or not one of opsd's"
            )
        for path in paths:
            self._open(path)

    def _open(self, path: Path) -> None:
        number = len(self._files)
        try:
            self._files.append(self._stack.enter_context(safe_open(path, framework="pt")))
            about = json.loads(self._files[-1].metadata()[PIECES])
            for name, piece in about.items():
                self.shapes[name], self.dtypes[name] = tuple(piece["shape"]), DTYPES[piece["dtype"]]
                (size,) = self._files[number].get_slice(name).get_shape()
                stored = Stored(piece["start"], piece["start"] + size, number)
                self._pieces.setdefault(name, []).append(stored)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} holds no pieces of tensors ({error}); it is damaged or not one of opsd's"
            ) from None

    def __enter__(self) -> TensorShards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries of a tensor, flat, in the type that was written, on the CPU."""
        stop = prod(self.shapes[name]) if stop is None else stop
        parts, at = [], start
        for piece in sorted(self._pieces[name]):
            if piece.start <= at < min(piece.stop, stop):
                last = min(piece.stop, stop)
                parts.append(self._files[piece.file].get_slice(name)[at - piece.start : last - piece.start])
                at = last
        if at < stop:
            raise DataError(f"{self.folder} lacks entries {at} to {stop} of {name} in {self.kind}_*.safetensors")
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape, in the type that was written."""
        return self.read(name).view(self.shapes[name])


def refuse_other_weights(there: TensorShards, here: Mapping[str, tuple[int, ...]]) -> None:
    """Raise DataError unless a checkpoint holds exactly these weights."""
    odd = sorted(there.shapes.keys() ^ here.keys())
    odd += [name for name, shape in here.items() if there.shapes.get(name, shape) != shape]
    if odd:
        raise DataError(
            f"{there.folder} does not hold the trained weights of this model: {odd[0]} is "
            f"{there.shapes.get(odd[0], 'not there')} in the checkpoint, {here.get(odd[0], 'not there')} in the model"
        )
