"""Which model trains on which card, by which words: `opsd plan`'s closed form of a step's peak
(`opsd_cli.insight.plan_memory`), and how far it is from peaks that were measured on an H100. No torch, no model, no
card: anyone can run it.

    python scripts/memory_table.py            # both tables, as they stand in docs/performance.md
    python scripts/memory_table.py --tokens 16384 --rank 64

All figures are GiB. A card counts as what it is called, less 5 % for fragments and 0.6 GiB for CUDA's own. Owns the
cases; what a setting does is in `recipes/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opsd_cli.insight.model_lookup import find_model
from opsd_cli.insight.plan_case import GIB, MIB, Rows, Setup, usable
from opsd_cli.insight.plan_drawing import rows_at_once
from opsd_cli.insight.plan_memory import Phase, memory_of

CARDS = (8, 16, 24, 48, 80)
PROMPT, COMPLETION = 512, 1024  # tokens of a row
FEWEST_ROWS = 4  # that must be drawn at once for a run to be worth starting
MODELS = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
SHAPES = {name: find_model(f"Qwen/{name}").shape for name in MODELS}


@dataclass(frozen=True)
class Way:
    """Words, and what they do to a setup in half precision under ZeRO stage 2 with checkpointing."""

    words: str
    rank: int = 16  # 0: all weights
    half_states: bool = False
    offload: bool = False
    four_bit: bool = False
    offloads: bool = False
    tiles: int = 1
    frozen_teacher: bool = False
    tokens: int = 4096  # of a micro-batch

    def setup(self, model: str, card: int, *, chunk: int | None = None, rows: Rows | None = None) -> Setup:
        """For a model on a card of so many GiB."""
        shape = SHAPES[model]
        default = Rows(self.tokens, self.tokens, self.tokens, True, FEWEST_ROWS, PROMPT, COMPLETION)
        return Setup(
            shape, rows or default, trained=shape.adapter(self.rank) if self.rank else 0, lora_rank=self.rank,
            half_states=self.half_states, offload_optimizer=self.offload, four_bit=self.four_bit,
            offloads=self.offloads, tiles=self.tiles, teacher="copy" if self.frozen_teacher else "shared",
            card=card, chunk=chunk,
        )  # fmt: skip


LONG = "train.offload_activations=true train.mlp_tiles=4"
WAYS = (
    Way("lora=none optim=adamw_full teacher=live", rank=0),
    Way(
        "lora=none optim=adamw_full teacher=live optim.state_dtype=bfloat16 model.dtype=bfloat16",
        rank=0, half_states=True,
    ),
    Way("lora=none optim=adamw_full teacher=live zero=stage2_offload", rank=0, offload=True),
    Way("lora=r16"),
    Way(f"lora=r16 {LONG}", offloads=True, tiles=4),
    Way("lora=r16 model.quantize=4bit", four_bit=True),
    Way(f"lora=r16 model.quantize=4bit {LONG}", four_bit=True, offloads=True, tiles=4),
)  # fmt: skip
MEASURED = (  # on an H100 80GB: what, way, bytes of the loss's chunk (None: by the card), phase, rows drawn, GiB
    ("LoRA of rank 16, 4 x 1,024 tokens", Way("", tokens=4624), 256 * MIB, "student", 0, 4.78),
    ("all weights, teacher live", Way("", rank=0, tokens=4624), 256 * MIB, "student", 0, 34.8),
    ("all weights, teacher initial", Way("", rank=0, frozen_teacher=True, tokens=4624), 256 * MIB, "student", 0, 38.0),
    ("LoRA of rank 64, 32 x 512 tokens drawn", Way("", rank=64), None, "drawing", 32, 6.4),
)
MEASURED_MODEL = "Qwen3-1.7B"


def phase_of(setup: Setup, name: str) -> Phase:
    return next(phase for phase in memory_of(setup).phases if phase.name == name)


def computed(way: Way, chunk: int | None, phase: str, drawn: int) -> float:
    """What the form says of a measured case, GiB."""
    rows = Rows(way.tokens, way.tokens, 4096, True, drawn or FEWEST_ROWS, 60, 512)
    return phase_of(way.setup(MEASURED_MODEL, 80, chunk=chunk, rows=rows), phase).total / GIB


def fits(setup: Setup, card: int) -> bool:
    return memory_of(setup).peak.total <= usable(card) and rows_at_once(setup) >= FEWEST_ROWS


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cards_table(ways: Sequence[Way]) -> str:
    """Of each way and model the peak of training on the smallest card that holds it, and that card."""
    rows = []
    for way in ways:
        cells = []
        for model in MODELS:
            card = next((card for card in CARDS if fits(way.setup(model, card), card)), None)
            peak = phase_of(way.setup(model, card), "student").total / GIB if card else 0.0
            cells.append(f"{peak:.1f} on {card}" if card else "-")
        rows.append([f"`{way.words}`", *cells])
    return table(["words", *MODELS], rows)


def measured_table() -> str:
    rows = []
    for what, way, chunk, phase, drawn, found in MEASURED:
        form = computed(way, chunk, phase, drawn)
        rows.append([f"{MEASURED_MODEL}, {what}", f"{form:.2f}", f"{found:.2f}", f"{form / found - 1:+.1%}"])
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
