"""What a user can get wrong about a model is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opsd_cli.engine.loading import Source, load_tokenizer, resolve
from opsd_cli.settings.errors import ConfigError

TINY = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)


def test_a_chat_template_of_ones_own_is_read_from_a_file(tmp_path: Path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert load_tokenizer(TINY, chat_template=str(file)).chat_template == "{{ messages[0]['content'] }}"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"model\.chat_template is .*own\.jinja.*, which cannot be read as text: "):
        load_tokenizer(TINY, chat_template=str(file))
    with pytest.raises(ConfigError, match="but there is no such file"):
        load_tokenizer(TINY, chat_template=str(tmp_path / "none.jinja"))


def test_a_bundled_name_that_does_not_exist_is_told_those_that_do():
    with pytest.raises(ConfigError, match=r"not bundled; available: bundled:tiny, bundled:tiny_teacher"):
        resolve("bundled:huge", None, key="model.path")
