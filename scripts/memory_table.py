"""Which model trains on which card, by which words: a closed form of a step's peak, and how far it is from peaks that
were measured on an H100. No torch, no model, no card: anyone can run it.

    python scripts/memory_table.py            # both tables, as they stand in docs/performance.md
    python scripts/memory_table.py --tokens 16384 --rank 64

All figures are GiB. A card counts as what it is called, less 5 % for fragments and 0.6 GiB for CUDA's own. Owns the
form; what a setting does is in `recipes/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

GIB = 2**30
CARDS = (8, 16, 24, 48, 80)
PROMPT, COMPLETION = 512, 1024  # tokens of a row
PAGE = 64  # positions of the decoder's cache
FUSED_SHARE, KEPT_SHARE, CHUNK_SHARE = 1 / 64, 1 / 8, 1 / 64  # of a card: copies of projections, cache, loss's buffer
FEWEST_ROWS = 4  # that must be drawn at once for a run to be worth starting


@dataclass(frozen=True)
class Shape:
    """What of an architecture decides its memory."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    tied: bool
    head_size: int = 128
    vocabulary: int = 151_936

    @property
    def attention(self) -> int:
        """Numbers that the projections of queries, keys and values make of a token."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def in_layers(self) -> int:
        """Weights of all layers, without norms."""
        own = self.attention + self.heads * self.head_size
        return self.layers * self.hidden * (own + 3 * self.inner)

    @property
    def outside(self) -> int:
        """Weights of embeddings and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Weights of an adapter on every linear layer."""
        inputs_and_outputs = 7 * self.hidden + self.attention + self.heads * self.head_size + 3 * self.inner
        return self.layers * rank * inputs_and_outputs

    @property
    def cached(self) -> int:
        """Bytes of a token in the key-value cache, in bfloat16."""
        return self.layers * 2 * self.kv_heads * self.head_size * 2


SHAPES = {
    "Qwen3-0.6B": Shape(28, 1024, 3072, 16, 8, tied=True),
    "Qwen3-1.7B": Shape(28, 2048, 6144, 16, 8, tied=True),
    "Qwen3-4B": Shape(36, 2560, 9728, 32, 8, tied=True),
    "Qwen3-8B": Shape(36, 4096, 12288, 32, 8, tied=False),
    "Qwen3-14B": Shape(40, 5120, 17408, 40, 8, tied=False),
    "Qwen3-32B": Shape(64, 5120, 25600, 64, 8, tied=False),
}


@dataclass(frozen=True)
class Way:
    """Words, and what they do to memory."""

    words: str
    rank: int = 16  # 0: all weights
    trained_bytes: float = 18  # of a trained weight: itself, its copy, two moments, its gradient in fp32
    four_bit: bool = False
    offloads: bool = False
    tiles: int = 1
    frozen_teacher: bool = False
    tokens: int = 4096  # of a micro-batch


# Of all weights: also the gradient in bfloat16 before it is added to the one in fp32. With bfloat16 states the weight
# (2), its copy (2), moments (4), the gradient in fp32 (4), as it comes (2) and as AdamW takes it (2).
FULL, FULL_BF16, FULL_OFFLOAD = 20, 16, 4
LONG = "train.offload_activations=true train.mlp_tiles=4"
WAYS = (
    Way("lora=none optim=adamw_full teacher=live", rank=0, trained_bytes=FULL),
    Way(
        "lora=none optim=adamw_full teacher=live optim.state_dtype=bfloat16 model.dtype=bfloat16",
        rank=0, trained_bytes=FULL_BF16,
    ),
    Way("lora=none optim=adamw_full teacher=live zero=stage2_offload", rank=0, trained_bytes=FULL_OFFLOAD),
    Way("lora=r16"),
    Way(f"lora=r16 {LONG}", offloads=True, tiles=4),
    Way("lora=r16 model.quantize=4bit", four_bit=True),
    Way(f"lora=r16 model.quantize=4bit {LONG}", four_bit=True, offloads=True, tiles=4),
)  # fmt: skip
MEASURED = (  # on an H100 80GB: what, shape, way, student's tokens of a micro-batch, rows drawn, GiB
    ("LoRA of rank 16, 4 x 1,024 tokens", "Qwen3-1.7B", Way("", tokens=4624), 0, 4.78),
    ("all weights, teacher live", "Qwen3-1.7B", Way("", rank=0, trained_bytes=FULL, tokens=4624), 0, 34.8),
    ("all weights, teacher initial", "Qwen3-1.7B",
     Way("", rank=0, trained_bytes=FULL, frozen_teacher=True, tokens=4624), 0, 38.0),
    ("LoRA of rank 64, 32 x 512 tokens drawn", "Qwen3-1.7B", Way("", rank=64), 32 * 9 * PAGE, 6.4),
)  # fmt: skip


def resting(shape: Shape, way: Way, *, in_update: bool) -> float:
    """Bytes of weights, adapter and optimizer; `in_update` with the gradient."""
    whole = shape.in_layers + shape.outside
    frozen = 0.516 * shape.in_layers + 2 * shape.outside if way.four_bit else 2 * whole
    if way.rank:
        return frozen + (18 if in_update else 14) * shape.adapter(way.rank)
    per_weight = way.trained_bytes if in_update else max(2, way.trained_bytes - 6)
    head = 4 * shape.vocabulary * shape.hidden if in_update else 0  # its gradient, added up over chunks
    return per_weight * whole + head + (2 * whole if way.frozen_teacher else 0)


def fused(shape: Shape, way: Way, card: int) -> float:
    """Bytes of the projections that the decoder keeps side by side; it does not know quantised ones."""
    copies = 2 * shape.layers * shape.hidden * shape.attention
    return 0 if way.four_bit or copies > FUSED_SHARE * card * GIB else copies


def training(shape: Shape, way: Way, card: int) -> float:
    """The peak of a micro-batch's backward pass, GiB."""
    width, kept = 2 * way.tokens, 2 if way.offloads else shape.layers
    inputs = kept * width * shape.hidden
    layer = width * (8 * shape.hidden + 2 * shape.attention + 3 * shape.inner / way.tiles)
    if way.four_bit:
        layer += 2 * shape.hidden * shape.inner  # one matrix at a time as bfloat16
    chunk = max(256 * 2**20, CHUNK_SHARE * card * GIB) if card else 256 * 2**20
    return (resting(shape, way, in_update=True) + fused(shape, way, card or 80) + inputs + max(chunk, layer)) / GIB


def drawing(shape: Shape, way: Way, card: int, cached_tokens: int) -> float:
    """The peak while completions are drawn, GiB."""
    return (resting(shape, way, in_update=False) + fused(shape, way, card) + cached_tokens * shape.cached) / GIB


def fits(shape: Shape, way: Way, card: int) -> bool:
    room, row = 0.95 * card - 0.6, -(-(PROMPT + COMPLETION) // PAGE) * PAGE
    return training(shape, way, card) <= room and drawing(shape, way, card, FEWEST_ROWS * row) <= room


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cards_table(ways: Sequence[Way]) -> str:
    """Of each way and model the peak of training on the smallest card that holds it, and that card."""
    rows = []
    for way in ways:
        cells = []
        for shape in SHAPES.values():
            card = next((card for card in CARDS if fits(shape, way, card)), None)
            cells.append(f"{training(shape, way, card):.1f} on {card}" if card else "-")
        rows.append([f"`{way.words}`", *cells])
    return table(["words", *SHAPES], rows)


def measured_table() -> str:
    rows = []
    for what, name, way, cached, found in MEASURED:
        shape = SHAPES[name]
        computed = drawing(shape, way, 80, cached) if cached else training(shape, way, 0)
        rows.append([f"{name}, {what}", f"{computed:.2f}", f"{found:.2f}", f"{computed / found - 1:+.1%}"])
    return table(["what", "computed", "measured", "off"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="train.micro_batch_tokens (default 4096)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    options = parser.parse_args()
    ways = [replace(way, tokens=options.tokens, rank=way.rank and options.rank) for way in WAYS]
    print(cards_table(ways), measured_table(), sep="\n\n")


if __name__ == "__main__":
    main()
