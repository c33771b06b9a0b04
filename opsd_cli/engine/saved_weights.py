"""The weights of a checkpoint without DeepSpeed and without a GPU: found in a run folder, verified, read by name
whatever ZeRO stage and ranks wrote them, and put into a model.

    stages 0 to 2   mp_rank_00_model_states.pt holds every trained weight; the optimizer's files its float32 original
    stage 3         each rank's optimizer file holds its slice of every weight, in float32
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opsd_cli.engine.checkpoint import damage_of, latest, published, target_of
from opsd_cli.engine.loading import CPU, LoadedModel, Source, add_adapter, load_model
from opsd_cli.settings.config import LoraSettings
from opsd_cli.settings.errors import ConfigError, DataError, display_path

Which = int | Literal["last", "best"]
"""A checkpoint of a run: that of a step, the newest, or the best by held-out accuracy while it trained."""

ENGINE = "engine"  # the folder that DeepSpeed wrote, of `zero.STATE_TAG`
POLICY = "lm."  # what stands before the names, `Policy.lm`
MODEL_FILES = "*mp_rank_00_model_states.pt"
SHARDS = "{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


class Ignored:
    """Stands in for the few objects of DeepSpeed's beside the tensors: settings, of which nothing is used here."""

    def __new__(cls, *arguments: object) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass


DEEPSPEED_OBJECTS = [
    (Ignored, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]


def find_checkpoint(checkpoints: Path, which: Which) -> Path:
    """The checkpoint that is meant, in a run's folder `checkpoints`. Raises ConfigError, with those that are there."""
    there = published(checkpoints)
    run = display_path(checkpoints.parent)
    if not there:
        raise ConfigError(
            f"{run} has no checkpoint: one is written every checkpoint.every steps, at the end and when a run is "
            "stopped"
        )
    steps = ", ".join(str(step_of(path)) for path in there)
    if which == "best":
        if (best := target_of(checkpoints, "best")) is None:
            raise ConfigError(
                f"{run} has no best checkpoint: one is kept where accuracy is measured while a run trains "
                f"(eval.every); its checkpoints are of steps {steps}"
            )
        return best
    found = latest(checkpoints) if which == "last" else next((one for one in there if step_of(one) == which), None)
    if found is None:
        raise ConfigError(f"{run} has no checkpoint of step {which}; its checkpoints are of steps {steps}")
    return found


def step_of(checkpoint: Path) -> int:
    """The steps that were done when a checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def read_weights(checkpoint: Path, *, masters: bool = False) -> dict[str, Tensor]:
    """Every trained weight of a checkpoint by its name in the policy (peft's names under LoRA), whole, on the CPU, in
    the type it is trained in. `masters`: the optimizer's own copy instead, float32 where the weights are in half
    precision, from which they are rounded after each update.

    Each file is compared with its hash first, and nothing in it is run. Raises DataError, with the file, where one is
    damaged, missing, or holds anything but tensors and plain values.
    """
    if damage := damage_of(checkpoint):
        raise DataError(f"{damage}; choose another checkpoint of the run (--step)")
    files = sorted((checkpoint / ENGINE).glob(MODEL_FILES))
    if not files:
        raise DataError(f"{checkpoint} holds no weights that opsd can read (no {ENGINE}/{MODEL_FILES})")
    states = _read(files[0])
    buffers = set(states["buffer_names"])
    module = {name: tensor for name, tensor in states["module"].items() if name not in buffers}
    # A frozen weight that is tied is saved under its second name.
    module = {name: tensor for name, tensor in module.items() if ".lora_" in name} or module
    second = set(states["shared_params"] or ())  # names of tied weights that have another name
    sharded = any(tensor.numel() == 0 for tensor in module.values())
    groups: Sequence[Mapping[str, Sequence[int]]] = states["param_shapes"] or ()
    if (sharded or masters) and groups:
        whole = _from_shards(checkpoint / ENGINE, groups, ranks=states["dp_world_size"], by_slices=sharded)
        if not masters:
            whole = {name: tensor.to(module[name].dtype) for name, tensor in whole.items()}
    else:
        whole = {name: tensor for name, tensor in module.items() if name not in second}
    return {name.removeprefix(POLICY): tensor for name, tensor in whole.items()}


def _from_shards(
    folder: Path, groups: Sequence[Mapping[str, Sequence[int]]], *, ranks: int, by_slices: bool
) -> dict[str, Tensor]:
    """Weights out of the optimizer's files. By slices (stage 3) each rank has a part of every weight, padded to equal
    parts; else (stages 1 and 2) one after another they are one long vector, cut anywhere."""
    key = "fp32_flat_groups" if by_slices else "single_partition_of_fp32_groups"
    # Not every file has DeepSpeed's prefix of bfloat16.
    prefix = "bf16_" if (folder / SHARDS.format(prefix="bf16_", rank=0)).is_file() else ""
    by_rank = [
        _read(folder / SHARDS.format(prefix=prefix, rank=rank))["optimizer_state_dict"][key] for rank in range(ranks)
    ]
    found: dict[str, Tensor] = {}
    if by_slices:
        start = 0
        for name, shape in (pair for group in groups for pair in group.items()):
            size = -(-prod(shape) // ranks)
            parts = torch.cat([part for flat in by_rank for part in _cut(flat, start, size)])
            found[name] = parts[: prod(shape)].view(*shape)
            start += size
        return found
    for group, flat in zip(groups, zip(*by_rank, strict=True), strict=True):
        start = 0
        for name, shape in group.items():
            found[name] = torch.cat(_cut(flat, start, prod(shape))).view(*shape)
            start += prod(shape)
    return found


def _cut(flat: Sequence[Tensor], start: int, size: int) -> list[Tensor]:
    """Entries `start` to `start + size` of vectors that stand one after another."""
    parts = []
    for vector in flat:
        if start < len(vector) and size > 0:
            parts.append(vector[start : start + size])
            size -= len(parts[-1])
        start = max(0, start - len(vector))
    return parts


def _read(file: Path) -> Any:
    """What a file of DeepSpeed's holds; tensors stay on the disk until they are used."""
    try:
        with torch.serialization.safe_globals([*DEEPSPEED_OBJECTS]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise DataError(f"{file} is gone; a run that goes on removes older checkpoints: try again") from None
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise DataError(
            f"{file} is refused: it must hold tensors and plain values only ({' '.join(str(error).split())[:150]})"
        ) from None


def put_into(lm: nn.Module, weights: Mapping[str, Tensor], *, source: Path) -> None:
    """Make the trained weights of a whole (not sharded) model those that `read_weights` gave, in the model's own type.
    `source` is where they are from, for messages. Raises DataError where they are of another model."""
    parameters = dict(lm.named_parameters())
    trained = {name for name in parameters if ".lora_" in name} or set(parameters)
    both = dict(lm.named_parameters(remove_duplicate=False))  # a tied weight may be saved under either name
    named = {id(both[name]) for name in weights if name in both}
    absent = sorted(name for name in trained if id(parameters[name]) not in named)
    unknown = sorted(weights.keys() - both.keys())
    if odd := [*absent, *unknown]:
        raise DataError(f"{source} does not hold the weights of this model ({odd[0]} is in only one of the two)")
    with torch.no_grad():
        for name, tensor in weights.items():
            if both[name].shape != tensor.shape:
                raise DataError(
                    f"{source} does not hold the weights of this model: {name} is {list(tensor.shape)} there and "
                    f"{list(both[name].shape)} here"
                )
            both[name].copy_(tensor)


def load_saved(
    source: Source, lora: LoraSettings, checkpoint: Path, *, device: torch.device = CPU, masters: bool = False
) -> LoadedModel:
    """The model of a checkpoint, to draw completions from or to write: loaded as the run loaded it (`source`, `lora`),
    with the checkpoint's weights; an adapter stays an adapter. Raises DataError as `read_weights` and `put_into` do."""
    weights = read_weights(checkpoint, masters=masters)
    causal = load_model(source, device=device).causal
    lm = add_adapter(causal, lora, seed=0)
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            # As it was trained: peft would hold an adapter of half-precision weights in float32.
            parameter.data = parameter.data.to(weights[name].dtype if name in weights else source.dtype)
    put_into(lm, weights, source=checkpoint)
    return LoadedModel(lm.requires_grad_(False).eval(), source)
