"""The table of cards in docs/performance.md is what its script computes, and that is near what a card has shown."""

from __future__ import annotations

import memory_table
import pytest
from memory_table import MEASURED, SHAPES, WAYS, cards_table, drawing, measured_table, training
from support import REPOSITORY

from opsd_cli.preflight import check
from opsd_cli.settings.recipe_files import find_folders


def test_the_page_has_the_tables():
    page = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    assert cards_table(WAYS) in page, "run scripts/memory_table.py"
    assert measured_table() in page, "run scripts/memory_table.py"


@pytest.mark.parametrize("what", MEASURED, ids=lambda what: what[0])
def test_what_is_computed_is_near_what_was_measured(what):
    _, name, way, cached, found = what
    computed = drawing(SHAPES[name], way, 80, cached) if cached else training(SHAPES[name], way, 0)
    assert computed == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.words)
def test_the_words_of_the_table_are_a_command_line(way):
    """Without what must be installed for 4 bits."""
    words = [word for word in way.words.split() if "quantize" not in word]
    _, (member,) = check(["recipe=quickstart", *words, "train.gradient_checkpointing=true"], find_folders())
    assert (member.config.lora.rank, member.config.train.mlp_tiles) == (way.rank, way.tiles)


def test_an_adapter_has_as_many_weights_as_counted():
    shape = memory_table.Shape(2, 32, 48, 4, 2, tied=True, head_size=16, vocabulary=64)
    layers = [(32, 64), (32, 32), (32, 32), (64, 32), (32, 48), (32, 48), (48, 32)]
    assert shape.adapter(4) == 2 * 4 * sum(map(sum, layers))
    assert shape.in_layers == 2 * sum(rows * columns for rows, columns in layers)
