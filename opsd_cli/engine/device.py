"""The device of a rank, the number format that the devices of all ranks can compute in, and how exactly they multiply:
decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch

from opsd_cli.settings.errors import ConfigError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BFLOAT16_FROM = (8, 0)  # Ampere; before it PyTorch emulates bfloat16, slowly
FLOAT16_FROM = (7, 0)  # Volta; DeepSpeed trains in float16 from here on


@dataclass(frozen=True)
class Card:
    """What a rank computes on. `capability` is None for a CPU."""

    name: str
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        """With the compute capability: `Tesla T4 (7.5)`."""
        return f"{self.name} ({'.'.join(map(str, self.capability))})" if self.capability else self.name

    def is_from(self, lowest: tuple[int, int]) -> bool:
        return self.capability is not None and self.capability >= lowest


def pick_device(environ: Mapping[str, str]) -> torch.device:
    """This rank's device, as the launcher decided it. Raises ConfigError with torch's message if it cannot be used."""
    if environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a CPU build of torch
        raise ConfigError(
            f"launcher.device is cuda, but torch can use no GPU here: {' '.join(str(error).split())}; "
            "use launcher.device=cpu"
        ) from error
    return torch.device("cuda", device_index(int(environ["LOCAL_RANK"]), torch.cuda.device_count()))


def device_index(local_rank: int, visible: int) -> int:
    """The number of this rank's device among the visible ones. Raises ConfigError if there are fewer."""
    if visible == 1:
        return 0  # each task was given one device of its own (SLURM's --gpus-per-task=1), whatever its rank
    if local_rank < visible:
        return local_rank
    raise ConfigError(
        f"this is rank {local_rank} (LOCAL_RANK) of its machine and torch sees {visible} GPUs here; start at most "
        f"{visible} ranks on a machine, or give each its own GPU (srun --gpus-per-task=1)"
    )


def align_local_rank(environ: MutableMapping[str, str], device: torch.device) -> None:
    """Make LOCAL_RANK the number of this rank's device, because DeepSpeed and vLLM take it for that. By then the rank's
    place on its machine has been read."""
    if device.index is None or environ["LOCAL_RANK"] == str(device.index):
        return
    environ["LOCAL_RANK"] = str(device.index)
    # DeepSpeed insists that Open MPI's variable says the same.
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environ:
        environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device.index)


def card_of(device: torch.device) -> Card:
    if device.type != "cuda":
        return Card("cpu")
    return Card(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def names_of(cards: Sequence[Card]) -> str:
    """The kinds of device of all ranks, in words."""
    return " + ".join(dict.fromkeys(card.name for card in cards))


def choose_dtype(asked: str, cards: Sequence[Card]) -> tuple[torch.dtype, str]:
    """The number format of the weights, and the reason for it. `cards` are those of all ranks, which must choose alike,
    so `auto` is what the oldest of them can: bfloat16 from Ampere on, float16 from Volta on, else float32.

    Raises ConfigError for bfloat16 on a card that would emulate it.
    """
    on_cpu = any(card.capability is None for card in cards)
    without = [card for card in cards if not on_cpu and not card.is_from(BFLOAT16_FROM)]
    if asked == "bfloat16" and without:
        raise ConfigError(
            f"model.dtype is bfloat16, but {without[0]} has none: PyTorch would emulate it, slowly; use "
            f"{'model.dtype=float16 or ' if without[0].is_from(FLOAT16_FROM) else ''}model.dtype=float32"
        )
    if asked != "auto":
        return DTYPES[asked], ""
    if on_cpu:
        return torch.float32, "auto: a CPU"
    if not without:
        return torch.bfloat16, f"auto: {names_of(cards)}"
    if old := [card for card in without if not card.is_from(FLOAT16_FROM)]:
        return torch.float32, f"auto: {old[0]} trains neither in bfloat16 nor in float16"
    return torch.float16, f"auto: {without[0]} has no bfloat16"


def free_bytes(device: torch.device) -> int:
    """What can be allocated on a card: what it has free, and what torch holds and does not use."""
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def forbid_reduced_precision() -> None:
    """Add up every matrix product in fp32."""
    matmul = torch.backends.cuda.matmul
    # Else cuBLAS adds up parts of a half-precision product in half precision, which matters where the sum is long: the
    # gradient of the hidden states is a sum over the whole vocabulary.
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    # TF32 has ten bits. It is torch's default to leave it off; a library imported before may have switched it on.
    matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
