"""A second, frozen model that only scores: the teacher of on-policy distillation. Owns the check that it speaks the
same tokens, and its pass; how its weights are placed is decided by the engine that hands in the module to run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine.last_mlp import last_mlp
from opsd_cli.engine.logits_check import check_logits
from opsd_cli.engine.packed import LayoutChoice, usable_layout
from opsd_cli.engine.policy import Policy, Source, load_causal, load_tokenizer
from opsd_cli.engine.process_group import Ranks
from opsd_cli.loss.chunked_head import Head, TokenScores
from opsd_cli.settings.errors import ConfigError


class FrozenModel:
    """Scores batches with its own weights and its own head."""

    def __init__(self, module: nn.Module, *, sharded: bool) -> None:
        self._module, self._sharded = module, sharded

    def score(self, batch: TokenBatch) -> TokenScores:
        heads: list[Head] = []

        def read(hidden_ND: Tensor, head: Head) -> Tensor:
            heads.append(head.kept(copy=self._sharded))
            return hidden_ND

        with torch.no_grad():
            hidden_ND = self._module(batch, read)
        return TokenScores(hidden_ND, heads[0])


def load_frozen(other: Source, own: Source, ranks: Ranks, *, device: torch.device) -> tuple[Policy, LayoutChoice]:
    """The other model, without gradients, and how its rows are run. Collective. Raises ConfigError unless both models
    read and write the same tokens.

    How it can be run is tried on `device`: where its weights will be, or the CPU where they are spread over ranks or
    streamed afterwards. What cannot be tried there (flash attention on a CPU) is not used.
    """
    check_same_tokens(load_tokenizer(other), load_tokenizer(own), other.path, own.path)
    causal = load_causal(other).requires_grad_(False).to(device)
    rows = usable_layout(causal, ranks)
    policy = Policy(causal, causal=causal, layout=rows.layout, last_mlp=last_mlp(causal, rows.layout))
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
