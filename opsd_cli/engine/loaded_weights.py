"""Whether what was loaded is what was asked for: every weight of the model came from its files, and every tensor of the
files found its place. transformers fills what is missing with random numbers, and only logs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from opsd_cli.settings.errors import DataError

SHOWN = 3  # names of tensors in a message
RECOMPUTED = ("rotary_emb.inv_freq", ".masked_bias")  # in files of old; every version computes them itself


def check_loaded(causal: PreTrainedModel, report: Mapping[str, Any], *, path: str) -> None:
    """Raise DataError, with the tensors that are wrong, where a model is not wholly what its files hold. `report` is
    transformers' own account of what it loaded (`output_loading_info`)."""
    own = {name.partition(".")[0] for name, _ in causal.named_parameters(remove_duplicate=False)}
    # Parts that this model has not, such as a picture encoder, may lie in the same files; layers that it has not are
    # what a wrong config.json leaves out.
    unexpected = (name for name in report["unexpected_keys"] if not name.endswith(RECOMPUTED))
    extra = [name for name in unexpected if name.partition(".")[0] in own]
    resized = [
        f"{name} ({_shape(held)} in the files, {_shape(wanted)} in the model)"
        for name, held, wanted in report["mismatched_keys"]
    ]
    problems = [
        *_problem("missing in the files", report["missing_keys"]),
        *_problem("of another size", resized),
        *_problem("in the files without a place in the model", extra),
        *map(str, report["error_msgs"]),
    ]
    if problems:
        raise DataError(
            f"model {path}: its weights do not fit its config.json: {'; '.join(problems)}. What is missing would be "
            "random numbers: fetch the model again, or correct config.json (such as vocab_size, tie_word_embeddings or "
            "num_hidden_layers)"
        )
    if causal.config.tie_word_embeddings and _is_untied(causal):
        raise DataError(
            f"model {path}: its weights do not fit its config.json: tie_word_embeddings is true, but the files hold an "
            "output head that differs from the embeddings; set tie_word_embeddings to false in config.json"
        )


def loaded_in_words(causal: PreTrainedModel, report: Mapping[str, Any]) -> str:
    """What was loaded and passed `check_loaded`, in one line."""
    aside = sorted({name.partition(".")[0] for name in report["unexpected_keys"] if not name.endswith(RECOMPUTED)})
    others = f", those of other parts left aside ({', '.join(aside[:SHOWN])})" if aside else ", none left over"
    head = (
        "the head is tied to the embeddings" if causal.config.tie_word_embeddings else "the head is a tensor of its own"
    )
    return f"{len(dict(causal.named_parameters()))} tensors, none missing{others}; {head}"


def _problem(what: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    if not listed:
        return []
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return [f"{what}: {', '.join(listed[:SHOWN])}{more}"]


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _is_untied(causal: PreTrainedModel) -> bool:
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    return (
        isinstance(head, nn.Linear)
        and isinstance(embedding, nn.Embedding)
        and head.weight.shape == embedding.weight.shape
        and head.weight is not embedding.weight
    )


def switch_off_dropout(causal: nn.Module) -> None:
    """Nothing of what this model computes depends on chance, in training either."""
    for module, name in list(_chances(causal)):
        setattr(module, name, 0.0)


def has_dropout(causal: nn.Module) -> bool:
    """Whether anything that it computes in training depends on chance."""
    return any(getattr(module, name) for module, name in _chances(causal))


def _chances(causal: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where the shares of what is dropped are held: `p` of a Dropout, and attributes that are handed to functions, such
    as attention_dropout, layerdrop and router_jitter_noise."""
    for module in causal.modules():
        for name, value in vars(module).items():
            is_share = isinstance(module, nn.Dropout) and name == "p"
            if isinstance(value, float) and (is_share or "drop" in name or "jitter" in name):
                yield module, name
