"""How many floating-point operations a model needs, in closed form: of a forward pass, of a backward pass, of drawing
completions. What a card could have done in the same time makes of it model FLOPs utilisation (2204.02311, appendix B):
work that is needed, so neither padding nor what gradient checkpointing computes again.

Matrix products and attention are counted, two operations for each multiply-add; norms, activations, sampling, the
optimizer and the recurrences of linear attention and state spaces are not: together some percent. Attention is counted
for the positions that a token sees, which is half of what a kernel without a causal mask computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opsd_cli.loss.types import Work

PEAKS = {
    "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "GH200": 989, "H20": 148,
    "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "T4": 65,
    "V100": 125, "RTX A6000": 155, "RTX 6000 Ada": 364, "RTX 4090": 165, "RTX 3090": 71, "RTX 5090": 210,
}  # fmt: skip
"""Part of a card's name -> 10^12 operations a second in half precision, dense, accumulated in fp32: the makers' sheets.
"""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
WINDOWED, WITHOUT = ("sliding_attention", "chunked_attention"), ("linear_attention", "mamba", "conv", "recurrent")


@dataclass(frozen=True)
class Cost:
    """What one model costs, in multiply-adds."""

    layers: int  # of a token, in the matrices of the decoder
    trained: int  # of these, in matrices that are trained
    head: int  # of a position that predicts
    head_trained: int
    attention: tuple[tuple[int, int | None], ...]  # of each layer: for a pair of positions; how many a token sees

    def attend(self, length: int, *, seen: int = 0) -> int:
        """The attention of the tokens `seen` to `length` of a row to those before them and to themselves."""
        return sum(each * (pairs(length, window) - pairs(seen, window)) for each, window in self.attention)


def pairs(length: int, window: int | None) -> int:
    """Of a query and a position that it sees: itself and those before it, at most `window`."""
    ends = length if window is None else min(length, window)
    return ends * (ends + 1) // 2 + (length - ends) * ends


class PassMeter:
    """Adds up what the passes of a model need, and those of the models beside it."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self._needed = self._repeated = 0  # multiply-adds
        self._others: list[PassMeter] = []

    def include(self, other: PassMeter) -> None:
        """Count another model's passes too."""
        self._others.append(other)

    def add_pass(
        self, lengths: Sequence[int], predicted: int, *, trains: bool, repeats: bool, shared: Sequence[int] = ()
    ) -> None:
        """A forward pass over rows of so many tokens, of which so many positions predict. `trains`: a backward pass
        follows; `repeats`: it makes the layers' forward pass once more; `shared`: how many first tokens of each row are
        those of the row before it, and count once."""
        cost, common = self.cost, shared or (0,) * len(lengths)
        tokens = sum(lengths) - sum(common)
        attention = sum(cost.attend(length, seen=seen) for length, seen in zip(lengths, common, strict=True))
        forward = cost.layers * tokens + attention
        self._needed += forward + cost.head * predicted
        if trains:
            # One product for the gradient of a product's input, one for that of its matrix, where that is trained.
            self._needed += (cost.layers + cost.trained) * tokens + 2 * attention
            self._needed += (cost.head + cost.head_trained) * predicted
        if repeats:
            self._repeated += forward

    def add_draws(self, prompt: int, completions: Sequence[int]) -> None:
        """Completions of so many tokens of one prompt of `prompt` tokens, which is read once for all of them. The last
        token of a completion is not read."""
        cost, read = self.cost, [length - 1 for length in completions]
        self._needed += cost.layers * (prompt + sum(read)) + cost.head * sum(completions)
        self._needed += cost.attend(prompt) + sum(cost.attend(prompt + more, seen=prompt) for more in read)

    def take(self) -> Work:
        """All since the last call."""
        works = [Work(2.0 * self._needed, 2.0 * self._repeated), *(other.take() for other in self._others)]
        self._needed = self._repeated = 0
        return Work(sum(work.flops for work in works), sum(work.repeated for work in works))


def cost_of(causal: PreTrainedModel) -> Cost:
    """What a model costs, as it stands: with its adapters, and what of it is trained. To be asked before DeepSpeed
    shards the weights."""
    settings = causal.config.get_text_config(decoder=True)
    share = _share_of_experts(settings.to_dict())
    matrices = [
        (size * (share if "experts." in f".{name}." and "shared" not in name else 1.0), weight.requires_grad)
        for name, size, weight in _matrices(causal.get_decoder())
    ]
    head = causal.get_output_embeddings()
    head_size = head.in_features * head.out_features
    return Cost(
        layers=round(sum(size for size, _ in matrices)),
        trained=round(sum(size for size, trained in matrices if trained)),
        head=head_size,
        head_trained=head_size if head.weight.requires_grad else 0,
        attention=tuple(_attention(settings)),
    )


def _matrices(decoder: nn.Module) -> Iterator[tuple[str, int, nn.Parameter]]:
    """Name, multiply-adds of a token and weight of every matrix; weights in 4 bits have another shape."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.in_features * module.out_features, module.weight
        elif isinstance(module, Conv1D):
            yield name, module.weight.numel(), module.weight
        elif not isinstance(module, nn.Embedding | nn.Conv1d):  # experts in one tensor, routers
            for own, weight in module.named_parameters(recurse=False):
                if weight.ndim >= 2 and not own.endswith("bias"):
                    yield f"{name}.{own}", weight.numel(), weight


def _share_of_experts(settings: dict[str, Any]) -> float:
    """Of the experts of a layer, how many a token goes through."""
    experts, chosen = (_first_number(settings, names) for names in (EXPERTS, CHOSEN))
    return chosen / experts if experts and chosen else 1.0


def _first_number(settings: dict[str, Any], names: Iterable[str]) -> int:
    found = (settings.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def _attention(config: PreTrainedConfig) -> Iterator[tuple[int, int | None]]:
    """Of each layer with attention: multiply-adds for a pair of positions, and how many positions a token sees."""
    settings = config.to_dict()

    def number(name: str) -> int:  # architectures have names of their own
        return _first_number(settings, (config.attribute_map.get(name, name), name))

    heads, layers = number("num_attention_heads"), number("num_hidden_layers")
    if not heads:
        return
    width = number("head_dim") or number("hidden_size") // heads
    keys = number("qk_nope_head_dim") + number("qk_rope_head_dim") or width
    each = heads * (keys + (number("v_head_dim") or width))
    window = number("sliding_window") if settings.get("use_sliding_window", True) else 0
    alike = ["sliding_attention" if window else "attention"]
    repeated = (settings.get("block_types") or alike) * layers
    kinds = settings.get("layer_types") or settings.get("layers_block_type") or repeated[:layers]
    for kind in map(str, kinds):
        if not kind.startswith(WITHOUT):
            yield each, (window or None) if kind in WINDOWED else None


def peak_flops(card: str, dtype: torch.dtype) -> float | None:
    """Operations a second that a card could do at most; None for one that is not in the table, and in float32, for
    which tensor cores are not used."""
    if dtype is torch.float32:
        return None
    # The longest name that fits: an H100 PCIe is an H100, too.
    names = sorted((name for name in PEAKS if name in card), key=len)
    return PEAKS[names[-1]] * 1e12 if names else None
