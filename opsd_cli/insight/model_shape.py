"""What of a model decides its memory and its arithmetic: its matrices, layer by layer, without torch; and the pieces
that architectures are described with (`architectures`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opsd_cli.settings.errors import DataError

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Matrix:
    """A linear map of a layer, or those of all its experts, stacked."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 0  # 0: an ordinary matrix
    used: int = 0  # experts that a token goes through
    fused: int = 1  # of a stack: matrices side by side, each with an adapter of its own
    adapts: bool = True  # whether all-linear puts an adapter beside it

    @property
    def weights(self) -> int:
        return (self.experts or 1) * (self.inputs + self.bias) * self.outputs

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with."""
        return (self.used if self.experts else 1) * self.inputs * self.outputs

    def adapter(self, rank: int) -> int:
        return rank * self.fused * (self.experts or 1) * (self.inputs + self.outputs)


@dataclass(frozen=True)
class Layer:
    matrices: tuple[Matrix, ...]
    other: int  # weights of norms, convolutions and the like


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory and its arithmetic."""

    kind: str  # transformers' model_type
    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    tied: bool
    outside: int  # weights of neither layers, embeddings nor head: the final norm, learned positions, a head's bias
    heads: int
    kv_heads: int
    head_size: int
    inner: int  # width between the matrices of an MLP, of all experts that a token goes through
    gated: bool  # whether the MLP multiplies two such
    head_norms: bool = False
    known: bool = True  # False: layers are read off safetensors files, and activations are estimated as a Llama's

    @property
    def in_layers(self) -> int:
        """Weights of the layers' matrices and biases."""
        return sum(matrix.weights for layer in self.layers for matrix in layer.matrices)

    @property
    def embeddings(self) -> int:
        """Weights of embeddings and output head; once where they are the same."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.in_layers + self.embeddings + self.outside + sum(layer.other for layer in self.layers)

    @property
    def active(self) -> int:
        """Weights of the layers that a token is multiplied with."""
        return sum(matrix.active for layer in self.layers for matrix in layer.matrices)

    def adapter(self, rank: int, targets: Iterable[str] = ("all-linear",)) -> int:
        """Weights of peft's adapters of this rank on the matrices named, as peft names them: by the end of a name."""
        names = tuple(targets)
        every = names == ("all-linear",)
        return sum(
            matrix.adapter(rank)
            for layer in self.layers
            for matrix in layer.matrices
            if (matrix.adapts if every else matrix.name in names)
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of the keys of a token, and of its values."""
        return self.kv_heads * self.head_size

    @property
    def attention(self) -> int:
        """Numbers that the projections of queries, keys and values make of a token."""
        return self.queries + 2 * self.keys


# The pieces of a layer, from a config.json ------------------------------------------------------------


def refuse(config: Settings, *names: str) -> None:
    """Variants of an architecture that few models use and no test counts."""
    for name in names:
        if config.get(name):
            raise DataError(f"opsd plan does not know {config['model_type']} with {name}={config[name]}")


def heads_of(c: Settings) -> tuple[int, int, int]:
    """Heads, heads of keys, size of a head."""
    heads = c["num_attention_heads"]
    return heads, c.get("num_key_value_heads") or heads, c.get("head_dim") or c["hidden_size"] // heads


def projections(c: Settings, *, bias: bool = False, out_bias: bool | None = None, out: str = "o_proj") -> list[Matrix]:
    heads, kv_heads, size = heads_of(c)
    width, queries, keys = c["hidden_size"], heads * size, kv_heads * size
    return [
        Matrix("q_proj", width, queries, bias),
        Matrix("k_proj", width, keys, bias),
        Matrix("v_proj", width, keys, bias),
        Matrix(out, queries, width, bias if out_bias is None else out_bias),
    ]


def gated_mlp(
    width: int, inner: int, *, bias: bool = False, names: str = "gate_proj up_proj down_proj", adapts: bool = True
) -> list[Matrix]:
    gate, up, down = names.split()
    sizes = ((gate, width, inner), (up, width, inner), (down, inner, width))
    return [Matrix(*size, bias, adapts=adapts) for size in sizes]


def plain_mlp(width: int, inner: int, *, bias: bool, names: str) -> list[Matrix]:
    up, down = names.split()
    return [Matrix(up, width, inner, bias), Matrix(down, inner, width, bias)]


def expert_stack(
    width: int, inner: int, experts: int, used: int, *, adapts: bool = True, bias: bool = False
) -> list[Matrix]:
    """Experts as transformers holds them: gate and up side by side, then down."""
    return [
        Matrix("gate_up_proj", width, 2 * inner, bias, experts, used, fused=2, adapts=adapts),
        Matrix("down_proj", inner, width, bias, experts, used, adapts=adapts),
    ]


def make_shape(
    c: Settings, layers: Iterable[Layer], *, inner: int, tied: bool = False, outside: int | None = None,
    gated: bool = True, heads: tuple[int, int, int] | None = None, head_norms: bool = False,
) -> Shape:  # fmt: skip
    """`tied` is the default of the architecture."""
    width = c["hidden_size"]
    return Shape(
        c["model_type"], tuple(layers), width, c["vocab_size"],
        bool(c.get("tie_word_embeddings", tied)), width if outside is None else outside,
        *(heads or heads_of(c)), inner, gated, head_norms,
    )  # fmt: skip
