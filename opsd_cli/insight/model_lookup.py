"""Where a model's size is read before it is loaded, without torch: its config.json in the package, a folder, the hub's
cache on this disk, the table of well-known models, or else that one file from the hub; and for an architecture that is
not known by its config, the headers of its safetensors files."""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from opsd_cli.data.hub import hub_errors, look_up
from opsd_cli.insight.architectures import BUILDERS, shape_of
from opsd_cli.insight.model_shape import Layer, Matrix, Shape
from opsd_cli.settings.errors import DataError

ASSETS = Path(__file__).parents[1] / "assets"
WELL_KNOWN = ASSETS / "model_configs.yaml"
BUNDLED = "bundled:"
OFFLINE_WAYS = "give a folder that holds its config.json: model.path=FOLDER"
HEADER_LIMIT = 100 * 2**20  # bytes of a header, as the format's own readers allow
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class FoundModel:
    """A model's size, and where it was read."""

    shape: Shape
    source: str  # in words
    positions: int | None  # it was made for


def find_model(path: str, revision: str | None = None) -> FoundModel:
    """The size of the model that `path` names: a hub id, a folder or `bundled:NAME`. Raises DataError for one that is
    not there or whose architecture is not known, OutsideError where the hub cannot be reached."""
    folder, config, source = _find_config(path, revision)
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else None
    positions = (text or config).get("max_position_embeddings")
    if str(config.get("model_type")) not in BUILDERS and folder is not None and (tensors := read_headers(folder)):
        return FoundModel(shape_of_weights(tensors, config), f"{source}; its safetensors files", positions)
    return FoundModel(shape_of(config), source, positions)


def _find_config(path: str, revision: str | None) -> tuple[Path | None, dict[str, Any], str]:
    """The model's folder, if it has one on this disk, what its config.json says, and where that is from."""
    folder = ASSETS / path.removeprefix(BUNDLED) if path.startswith(BUNDLED) else Path(path)
    if (folder / "config.json").is_file():
        return folder, _read_config(folder / "config.json"), f"{path}/config.json"
    if path.startswith((BUNDLED, ".", "/", "~")) or path.count("/") > 1 or folder.exists():
        raise DataError(f"model.path is {path!r}, where there is no config.json")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        raise DataError(f"model.path is {path!r}: neither a folder nor a hub id, which looks like OWNER/NAME") from None
    if isinstance(cached, str):
        return Path(cached).parent, _read_config(Path(cached)), f"{path}, config.json in the hub's cache"
    if revision is None and path in well_known():
        return None, dict(well_known()[path]), f"{path}, from opsd's table of models"
    return None, _read_config(_download(path, revision)), f"{path}, config.json from the hub"


def _download(path: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    commit = look_up("model", path, revision=revision, hint=OFFLINE_WAYS)
    with hub_errors(f"config.json of model {path}", hint=OFFLINE_WAYS):
        return Path(hf_hub_download(path, "config.json", revision=commit, local_files_only=commit is None))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{file} holds no settings of a model")
    return config


@cache
def well_known() -> Mapping[str, Mapping[str, Any]]:
    """Hub id -> what its config.json says of its size."""
    table: dict[str, Mapping[str, Any]] = yaml.safe_load(WELL_KNOWN.read_text(encoding="utf-8"))
    return table


# Headers -----------------------------------------------------------------------------------------------------------


def read_headers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the safetensors files of a folder; nothing where there are none. Reads the
    first kilobytes of each. Raises DataError for a file that is none."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (size,) = struct.unpack("<Q", stream.read(8))
                header: dict[str, Any] = json.loads(stream.read(min(size, HEADER_LIMIT)))
            tensors = {
                name: tuple(map(int, entry["shape"])) for name, entry in header.items() if name != "__metadata__"
            }
        except (OSError, ValueError, struct.error, AttributeError, TypeError, KeyError):
            raise DataError(f"{file} is not a whole safetensors file") from None
        found |= tensors
    return found


def shape_of_weights(tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Shape:
    """A shape from what the files hold: weights exactly, activations as those of a Llama with its matrices. Raises
    DataError for a config that does not even name a width."""
    text: Mapping[str, Any] = config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
    width, vocabulary = text.get("hidden_size"), text.get("vocab_size")
    if not isinstance(width, int) or not isinstance(vocabulary, int):
        raise DataError(f"config.json of model type {config.get('model_type')!r} names no hidden_size and vocab_size")
    layers: dict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    outside, tables = 0, 0
    for name, size in tensors.items():
        if place := _LAYER.search(name):
            layers[name[: place.end()]].append((name, size))
        elif size == (vocabulary, width):
            tables += 1
        else:
            outside += _product(size)
    heads = text.get("num_attention_heads") or 1
    return Shape(
        str(config.get("model_type")), tuple(_layer(parts) for parts in layers.values()), width, vocabulary,
        tied=tables < 2, outside=outside, heads=heads, kv_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or width // heads, inner=text.get("intermediate_size") or 4 * width, gated=True,
        known=False,
    )  # fmt: skip


def _layer(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> Layer:
    """Matrices are what a layer holds of two dimensions under `.weight`; all else counts as weights alone."""
    matrices, other = [], 0
    for name, size in tensors:
        *_, owner, kind = name.split(".")
        if len(size) == 2 and kind == "weight":
            matrices.append(Matrix(owner, size[1], size[0]))
        else:
            other += _product(size)
    return Layer(tuple(matrices), other)


def _product(size: Iterable[int]) -> int:
    numbers = 1
    for one in size:
        numbers *= one
    return numbers
