"""The table of cards in docs/performance.md is what its script computes, and that is near what a card has shown."""

from __future__ import annotations

import pytest
from memory_table import MEASURED, WAYS, cards_table, computed, measured_table
from support import REPOSITORY

from opsd_cli.insight.architectures import shape_of
from opsd_cli.insight.model_shape import Shape
from opsd_cli.insight.plan_setup import Device, setup_of
from opsd_cli.preflight import check
from opsd_cli.settings.known_devices import CARDS
from opsd_cli.settings.recipe_files import find_folders


def test_the_page_has_the_tables():
    page = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    assert cards_table(WAYS) in page, "run scripts/memory_table.py"
    assert measured_table() in page, "run scripts/memory_table.py"


@pytest.mark.parametrize("what", MEASURED, ids=lambda what: what[0])
def test_what_is_computed_is_near_what_was_measured(what):
    _, way, chunk, phase, drawn, found = what
    assert computed(way, chunk, phase, drawn) == pytest.approx(found, rel=0.02)


def small() -> Shape:
    return shape_of({
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    })  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.words)
def test_the_words_of_the_table_make_the_setup_that_is_computed(way):
    """Without what must be installed for 4 bits."""
    words = [word for word in way.words.split() if "quantize" not in word]
    _, (member,) = check(["recipe=quickstart", *words, "train.gradient_checkpointing=true"], find_folders())
    card = CARDS["h100"]
    made = setup_of(member.config, small(), Device(card.title, card.memory_gib, card), ranks=1)
    meant = way.setup("Qwen3-1.7B", 80)
    for name in (
        "lora_rank", "half_states", "offload_optimizer", "offloads", "tiles", "checkpoints", "teacher", "sharding",
        "bytes", "bucket", "passes",
    ):  # fmt: skip
        assert getattr(made, name) == getattr(meant, name), name
