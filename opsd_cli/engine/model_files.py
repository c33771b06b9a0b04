"""What lies in the folder of a model, looked at before anything is loaded from it: a folder that is no model, or only a
part of one, is told as what it is."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from opsd_cli.settings.errors import DataError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "*.safetensors"
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json", "tokenization*.py")
LFS_POINTER = b"version https://git-lfs"
"""What a file begins with whose contents are still on the server that it was cloned from."""


def check_folder(folder: Path, *, key: str) -> None:
    """Raise DataError, with the file that is wrong, where `folder` cannot be loaded as a model. `key` is the setting
    that names it."""
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise DataError(
                f"{key} is {str(folder)!r}, which holds an adapter and no model; merge it into {_base_of(folder)} "
                "first (peft: merge_and_unload), or give the folder of a whole model"
            )
        raise DataError(f"{key} is {str(folder)!r}, but there is no {folder / CONFIG}")
    for file in (folder / CONFIG, folder / INDEX, *sorted(folder.glob("*token*.json")), folder / "vocab.json"):
        _check_json(file)
    weights = sorted(folder.glob(WEIGHTS))
    if not weights:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        raise DataError(
            f"{key} is {str(folder)!r}, in which there are no weights as .safetensors"
            + ("; those as .bin or .pt are pickles, which can run code: save the model with safetensors" * pickled)
        )
    for file in weights:
        _check_weights(file)
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise DataError(
                f"{folder / INDEX} names {len(names)} files of weights, of which {len(absent)} are missing: "
                f"{', '.join(absent[:3])}; fetch the model again"
            )


def check_tokenizer(folder: Path) -> None:
    """Raise DataError where a model's folder has no tokenizer."""
    if not any(file.is_file() for pattern in TOKENIZERS for file in folder.glob(pattern)):
        raise DataError(
            f"{folder} has no tokenizer ({folder / TOKENIZERS[0]}); copy the tokenizer's files there from the model "
            "that it was made from"
        )


def _base_of(adapter: Path) -> str:
    """The model that an adapter is for, in words."""
    try:
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return str(settings.get("base_model_name_or_path") or "its base model")
    except (OSError, ValueError, AttributeError):
        return "its base model"


def _refuse_pointer(file: Path) -> None:
    with open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(
                f"{file} is a pointer of Git LFS and not the file itself; run `git lfs pull` in {file.parent}, or "
                "fetch the model again"
            )


def _check_json(file: Path) -> None:
    """A file of settings, if it is there, is JSON as a whole."""
    if not file.is_file():
        return
    _refuse_pointer(file)
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is cut short or damaged ({error}); fetch the model again") from error
    if file.name in (CONFIG, INDEX) and not isinstance(held, dict):
        raise DataError(f"{file} holds a {type(held).__name__}; it must hold settings by name, as {{...}}")
    if file.name == INDEX and not isinstance(held.get("weight_map"), dict):
        raise DataError(f"{file} has no `weight_map`, which says where each tensor is; fetch the model again")


def _check_weights(file: Path) -> None:
    _refuse_pointer(file)
    try:
        with safe_open(file, framework="pt"):
            pass  # the header is read, and the length compared with it
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is cut short or damaged ({error}); fetch the model again") from error
