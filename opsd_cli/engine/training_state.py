"""What a checkpoint holds of an engine, by the names of the weights and without a trace of how they are sharded: the
trained weights as the optimizer keeps them, AdamW's two moments, and how many updates each has seen. Written by every
rank into files of its own, nothing communicated; read by any number of ranks at any ZeRO stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opsd_cli.engine.process_group import Ranks
from opsd_cli.engine.tensor_shards import Piece, TensorShards, refuse_other_weights, shard_file, write_pieces
from opsd_cli.engine.weight_copies import forget_second_set, is_sharded, shape_of, storage
from opsd_cli.settings.errors import DataError

FOLDER = "engine"  # of a checkpoint
WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names for the means of the gradient and of its square
COUNTS = "updates"


class Held(NamedTuple):
    """What this rank holds of one trained weight: entries `start` and following, flat, where the optimizer has them."""

    name: str
    parameter: nn.Parameter
    start: int
    master: Tensor  # a view of `owner`
    owner: Tensor  # the tensor that the optimizer updates, in which it has a state
    offset: int  # of `master` in `owner`

    @property
    def stop(self) -> int:
        return self.start + self.master.numel()

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """The same entries of one of the moments; None before the first update."""
        state = optimizer.state.get(self.owner)
        return state[key].view(-1).narrow(0, self.offset, self.master.numel()) if state else None


def held_whole(parameters: Mapping[str, nn.Parameter]) -> list[Held]:
    """Weights that every rank holds and updates whole."""
    return [
        Held(name, parameter, 0, parameter.detach().view(-1), parameter, 0) for name, parameter in parameters.items()
    ]


def save_state(
    folder: Path,
    held: Sequence[Held],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    *,
    each_has_all: bool,
    loss_scale: Mapping[str, float] | None = None,
) -> None:
    """Write this rank's share. `each_has_all`: ranks hold the same, and each writes a part of it."""
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)

    def pieces(entries: Iterable[tuple[Held, Tensor | None]]) -> Iterable[Piece]:
        for one, values in entries:
            if values is not None:
                piece = Piece(one.name, shape_of(one.parameter), one.start, values, one.parameter.dtype)
                yield piece.share(ranks.rank, ranks.world_size) if each_has_all else piece

    # One file after another: no more than one kind of tensor is copied to the CPU at a time.
    write_pieces(shard_file(folder, WEIGHTS, ranks.rank), pieces((one, one.master) for one in held))
    for key in MOMENTS:
        write_pieces(shard_file(folder, key, ranks.rank), pieces((one, one.moment(optimizer, key)) for one in held))
    counts = {one.name: int(optimizer.state[one.owner]["step"]) for one in held if optimizer.state.get(one.owner)}
    about: dict[str, Any] = {"updates": counts, "loss_scale": loss_scale}
    (folder / f"{COUNTS}_{ranks.rank:05d}.json").write_text(json.dumps(about), encoding="utf-8")


def load_state(
    folder: Path, held: Sequence[Held], optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Mapping[str, float] | None:
    """The inverse of `save_state`, in place and in whatever layout `held` has; `parameters` are all trained weights.
    Returns the scale of the loss that was saved, in float16.

    Raises DataError where a file is damaged or holds other weights than these."""
    folder = folder / FOLDER
    with TensorShards(folder, WEIGHTS) as weights:
        refuse_other_weights(weights, {name: shape_of(parameter) for name, parameter in parameters.items()})
        for one in held:
            one.master.copy_(weights.read(one.name, one.start, one.stop))
        # What passes run on is rounded from what the optimizer keeps, as after an update.
        for one in held:
            if is_sharded(one.parameter):
                storage(one.parameter).data.view(-1)[: one.master.numel()].copy_(one.master)
                forget_second_set(one.parameter)
        for name, parameter in parameters.items():
            if not is_sharded(parameter):
                parameter.data.copy_(weights.whole(name))
    abouts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"{COUNTS}_*.json"))]
    if not abouts:
        raise DataError(f"{folder} holds no {COUNTS}_*.json; the checkpoint is incomplete, or not one of opsd's")
    counts: dict[str, int] = {name: count for about in abouts for name, count in about["updates"].items()}
    _set_counts(held, optimizer, counts)
    for key in MOMENTS:
        with TensorShards(folder, key) as moments:
            for one in held:
                values = one.moment(optimizer, key)
                if values is not None and one.name in counts:
                    values.copy_(moments.read(one.name, one.start, one.stop))
                elif values is not None:
                    values.zero_()
    scale: dict[str, float] | None = abouts[0]["loss_scale"]
    return scale


def _set_counts(held: Sequence[Held], optimizer: torch.optim.Optimizer, counts: Mapping[str, int]) -> None:
    """How many updates each weight has seen, with moments of zero, as AdamW makes them, where there are none yet."""
    by_owner: dict[Tensor, int] = {}
    for one in held:
        # A partition of several weights has one count; theirs differ only where one had no gradient in some updates.
        by_owner[one.owner] = max(by_owner.get(one.owner, 0), counts.get(one.name, 0))
    for owner, count in by_owner.items():
        if count and not optimizer.state.get(owner):
            optimizer.state[owner] = {
                "step": torch.zeros((), dtype=torch.float32, device=owner.device),
                **{key: torch.zeros_like(owner, memory_format=torch.preserve_format) for key in MOMENTS},
            }
        if optimizer.state.get(owner):
            optimizer.state[owner]["step"].fill_(count)
