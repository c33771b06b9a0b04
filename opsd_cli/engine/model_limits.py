"""What a model's own settings allow: how long a row may be, which token ids it has a row of its table for, and which
model may teach it. Known before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from opsd_cli.engine.loading import Source, load_tokenizer, read_config, text_settings
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError

POSITION_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length",
    "max_target_positions",
)  # fmt: skip
"""What architectures call the number of positions they were made for."""


def longest_row(config: PreTrainedConfig) -> tuple[int, str] | None:
    """The most tokens that a row may have, and why, in words; None where the settings do not say."""
    settings = text_settings(config)
    limits = [(settings[key], f"the model has {settings[key]} positions") for key in POSITION_KEYS if key in settings]
    found = [(limit, why) for limit, why in limits if isinstance(limit, int) and limit > 0][:1]
    for rope in _rotations(settings.get("rope_parameters")):
        # Its frequencies are those of the longest row of a batch: beyond this length a row's scores would depend on the
        # rows beside it, and a cache would hold keys of both kinds.
        original = rope.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and isinstance(original, int):
            found.append(
                (original, f"the model has other rotary frequencies (longrope) for rows of more than {original} tokens")
            )
    return min(found) if found else None


def longest_of(config: Config) -> int:
    """The most tokens that a row of this run may have."""
    return config.prompts.max_tokens + longest_completion(config)


def longest_completion(config: Config) -> int:
    written = config.context.write_tokens if config.context.write is not None else 0
    return max(config.sampling.max_completion_tokens, config.eval.max_completion_tokens, written)


def _rotations(rope: object) -> list[Mapping[str, Any]]:
    """The settings of each kind of rotation that a model has."""
    if not isinstance(rope, Mapping):
        return []
    return [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, Mapping)]


def table_of(config: PreTrainedConfig) -> int:
    """The rows of a model's tables: ids are below it."""
    return int(text_settings(config)["vocab_size"])


def has_unknown_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has ids beyond the model's table; they do no harm where they do not occur."""
    return max(tokenizer.vocab_size - 1, *tokenizer.get_added_vocab().values(), 0) >= table_of(config)


def unknown_token(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]
) -> str | None:
    """A token of `rows` that the model has no row of its table for, in words."""
    worst = max((max(ids, default=0) for ids in rows), default=0)
    if worst < table_of(config):
        return None
    token = tokenizer.convert_ids_to_tokens(worst)
    return f"the token {token!r} has id {worst}, but the model has a table of {table_of(config)} rows (vocab_size)"


def check_same_tokens(other: Source, own: Source) -> None:
    """Raise ConfigError unless both models have the same tokens: completions travel as ids, so an id must mean the same
    text to both, and over the student's whole table."""
    theirs, ours = (load_tokenizer(source).get_vocab() for source in (other, own))
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        raise ConfigError(
            f"teacher.path {other.path} and model.path {own.path} have different tokenizers ({len(different)} tokens "
            f"differ, for example {different[0]!r}); distillation compares next-token distributions, so choose a "
            "teacher of the same model family"
        )
    own_rows, their_rows = table_of(read_config(own)), table_of(read_config(other))
    if their_rows < own_rows:
        raise ConfigError(
            f"teacher.path {other.path} has a table of {their_rows} rows and model.path {own.path} one of {own_rows}; "
            "a teacher must have a row for every token that the student may draw, so choose one with as many or more"
        )
