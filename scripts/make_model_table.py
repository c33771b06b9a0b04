"""Write the table of docs/models.md: how each architecture of the zoo (tests/zoo.py) is run, or why it is refused.

    python scripts/make_model_table.py            # loads every tiny model: half a minute

tests/test_zoo.py trains the same models and compares the table.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

if TYPE_CHECKING:
    from zoo_run import Run

PAGE = REPOSITORY / "docs" / "models.md"
BEGIN, END = "<!-- generated: models -->\n", "<!-- end -->\n"
HEADER = """\
| architecture | what is special | rows | attention | completions | LoRA |
|---|---|---|---|---|---|
"""


def table_of(runs: Mapping[str, Mapping[str, Run]]) -> str:
    """A line for each family: with all weights, and whether an adapter goes the same way."""
    return HEADER + "".join(
        line_of(name, **{how.replace(" ", "_"): run for how, run in both.items()}) for name, both in runs.items()
    )


def line_of(name: str, all_weights: Run, lora: Run) -> str:
    from zoo import FAMILIES

    family = FAMILIES[name]
    kind = f"`{family.kind}`"
    if all_weights.refusal:
        reason = all_weights.refusal.partition(") ")[2].split(":")[0]  # after the name and type of the model
        return f"| {kind} | {family.what} | refused: it {reason} | | | |\n"
    rows = "packed" if all_weights.layout == "packed" else "padded"
    attention = "sdpa" if all_weights.attention == "opsd_packed" else all_weights.attention
    adapter = "every linear layer" if family.targets == ("all-linear",) else ", ".join(f"`{t}`" for t in family.targets)
    if lora.refusal:
        adapter = "refused"
    return f"| {kind} | {family.what} | {rows} | {attention} | {way_of(all_weights.decoder)} | {adapter} |\n"


def way_of(decoder: str) -> str:
    if "fast forward pass" in decoder:
        return "fast pass"
    return "own forward, no cache" if "without a cache" in decoder else "own forward"


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from one_process import one_rank
    from recipe_support import config_of
    from zoo import FAMILIES
    from zoo_run import RANKS, WORDS, load_family

    base = config_of(*WORDS)
    with tempfile.TemporaryDirectory() as folder, one_rank():
        runs = {
            family: {how: load_family(family, Path(folder), base, rank=rank)[0] for how, rank in RANKS.items()}
            for family in FAMILIES
        }
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table_of(runs) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
