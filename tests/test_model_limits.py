"""What a model's settings allow is known before its weights are loaded: lengths, ids, teachers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config
from zoo import FAMILIES

from opsd_cli.engine.loading import Source
from opsd_cli.engine.model_limits import check_same_tokens, has_unknown_tokens, longest_row, unknown_token
from opsd_cli.loss.types import Head
from opsd_cli.settings.errors import ConfigError


@pytest.mark.parametrize(
    ("family", "limit"),
    [("llama", 128), ("gpt2", 128), ("mpt", 128), ("gemma3", 128), ("bloom", None), ("mamba", None), ("phi3", 64)],
)
def test_the_longest_row_is_found_under_the_names_that_architectures_use(family: str, limit: int | None):
    found = longest_row(FAMILIES[family].config())
    assert (found and found[0]) == limit


def test_a_rotation_that_changes_with_the_longest_row_bounds_the_rows():
    """Beyond it a row's scores would depend on the rows beside it."""
    limit, why = longest_row(FAMILIES["phi3"].config())
    assert (limit, why) == (64, "the model has other rotary frequencies (longrope) for rows of more than 64 tokens")


def test_a_token_beyond_the_table_is_named():
    tokenizer = AutoTokenizer.from_pretrained("opsd_cli/assets/tiny")
    config = GPT2Config(vocab_size=len(tokenizer))
    assert not has_unknown_tokens(config, tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    assert has_unknown_tokens(config, tokenizer)
    assert unknown_token(config, tokenizer, [[3, 5], []]) is None
    found = unknown_token(config, tokenizer, [[3], [5, 1024]])
    assert found == "the token '<|new|>' has id 1024, but the model has a table of 1024 rows (vocab_size)"


def test_a_teacher_may_have_more_rows_than_the_student_and_not_fewer(tmp_path):
    for name, rows in (("small", 257), ("large", 300)):
        replace(FAMILIES["llama"], settings={"vocab_size": rows}).make(tmp_path / name)
    small, large = (
        Source(str(tmp_path / name), None, torch.float32, "sdpa", False, True) for name in ("small", "large")
    )
    check_same_tokens(large, small)
    with pytest.raises(ConfigError, match=r"has a table of 257 rows and model\.path .* of 300; a teacher must have"):
        check_same_tokens(small, large)


def test_rows_beyond_the_students_table_do_not_count():
    weight_VD = torch.randn(6, 4)
    padded = Head(torch.cat([weight_VD, torch.zeros(2, 4)]), torch.zeros(8), scale=0.5, softcap=3.0)
    hidden_nD = torch.randn(3, 4)
    own = Head(weight_VD, torch.zeros(6), scale=0.5, softcap=3.0)
    assert torch.equal(padded.first_rows(6).logits(hidden_nD), own.logits(hidden_nD))
    with pytest.raises(AssertionError, match=r"a product of shape \(3, 8\) does not fit a buffer of \(3, 6\)"):
        padded.product(hidden_nD, torch.empty(3, 6))
