"""A second, frozen model that only scores: the teacher of on-policy distillation. How its weights are placed is decided
by the engine, which hands in the module to run."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine.loading import Source, load_causal, load_tokenizer
from opsd_cli.engine.logits_check import check_logits
from opsd_cli.engine.packed import LayoutChoice, usable_layout
from opsd_cli.engine.policy import Policy, score_tokens
from opsd_cli.engine.process_group import Ranks
from opsd_cli.loss.types import TokenScores
from opsd_cli.settings.errors import ConfigError


class FrozenModel:
    """Scores batches with its own weights and its own head. `module` is `policy`, or what DeepSpeed made of it."""

    def __init__(self, policy: Policy, module: nn.Module, *, sharded: bool) -> None:
        self._policy, self._module, self._sharded = policy, module, sharded

    def score(self, batch: TokenBatch) -> TokenScores:
        """Hidden states and head of this model at the positions that predict completion tokens."""
        return score_tokens(self._module, self._policy, batch, keeps_head=True, copies=self._sharded)


def load_frozen(other: Source, own: Source, ranks: Ranks, *, device: torch.device) -> tuple[Policy, LayoutChoice]:
    """The other model, without gradients, and how its rows are run. Collective. Raises ConfigError unless both models
    read and write the same tokens.

    How it can be run is tried on `device`: where its weights will be, or the CPU where they are spread over ranks or
    streamed afterwards. What cannot be tried there (flash attention on a CPU) is not used.
    """
    check_same_tokens(load_tokenizer(other), load_tokenizer(own), other.path, own.path)
    causal = load_causal(other).requires_grad_(False).to(device)
    rows = usable_layout(causal, ranks)
    policy = Policy(causal, layout=rows.layout)
    check_logits(policy, other.path)
    return policy, rows


def check_same_tokens(
    other: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, other_path: str, own_path: str
) -> None:
    """Completions travel as ids, so an id must mean the same text to both models."""
    ours, theirs = own.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise ConfigError(
        f"teacher.path {other_path} and model.path {own_path} have different tokenizers ({len(different)} tokens "
        f"differ, for example {different[0]!r}); distillation compares next-token distributions, so choose a teacher "
        "of the same model family"
    )
