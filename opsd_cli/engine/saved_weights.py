"""The weights of a checkpoint without DeepSpeed and without a GPU: found in a run folder, verified, read by name
whatever ZeRO stage and ranks wrote them, and put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from opsd_cli.engine.checkpoint import damage_of, latest, published, target_of
from opsd_cli.engine.loading import CPU, LoadedModel, Source, add_adapter, load_model
from opsd_cli.engine.tensor_shards import TensorShards
from opsd_cli.engine.training_state import FOLDER, WEIGHTS
from opsd_cli.settings.config import LoraSettings
from opsd_cli.settings.errors import ConfigError, DataError, display_path

Which = int | Literal["last", "best"]
"""A checkpoint of a run: that of a step, the newest, or the best by held-out accuracy while it trained."""


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

    Each file is compared with its hash first. Raises DataError, with the file, where one is damaged or missing.
    """
    if damage := damage_of(checkpoint):
        raise DataError(f"{damage}; choose another checkpoint of the run (--step)")
    with TensorShards(checkpoint / FOLDER, WEIGHTS) as stored:
        return {
            name: stored.whole(name) if masters else stored.whole(name).to(stored.dtypes[name])
            for name in stored.shapes
        }


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
