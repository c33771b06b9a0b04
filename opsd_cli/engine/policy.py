"""The policy: one causal language model as the function that both roles share, from a batch to hidden states and the
output head. Apart from `zero`, so that a model can be scored without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine.flops import PassMeter, cost_of
from opsd_cli.engine.loading import causal_of, text_settings
from opsd_cli.engine.packed import SHARING, Layout, run_rows, run_whole_rows
from opsd_cli.engine.small_cards import OffloadActivations
from opsd_cli.loss.types import Head, TokenScores

Read = Callable[[Tensor, Head], tuple[Any, ...]]
"""Given hidden states [N, D] and the head's numbers, returns a tuple of tensors. Called while the head's weight is
gathered."""


class OutputHead(nn.Linear):
    """The model's own output head, which can also be read: `head(hidden_ND, read)` hands its weight to `read`.

    A loss in chunks needs the head's weight, and under ZeRO-3 a weight is whole only while its own module is called. So
    the loss is computed inside that call: DeepSpeed's hooks gather and release as for any other module, and every rank
    makes the same calls whatever its N is. Without `read` it is the linear map that it replaces.
    """

    def __init__(self, linear: nn.Linear, transforms: dict[str, Any]) -> None:
        # nn.Linear's own would allocate a weight. The parameters are those of `linear`, so ties and names stay.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.transforms = transforms

    def forward(self, hidden_ND: Tensor, read: Read | None = None) -> Any:
        return super().forward(hidden_ND) if read is None else read(hidden_ND, self.numbers())

    def numbers(self) -> Head:
        """The head as the loss takes it."""
        return Head(self.weight, self.bias, **self.transforms)


class Policy(nn.Module):
    """One set of weights that plays both roles. `lm` is a transformers model or, with LoRA, the peft model around it.

    `longest_row` is the most tokens that a row of the run may have; `shares` says whether rows may share a prompt that
    is run once.

    Calling the policy runs the decoder on a batch, picks the hidden states that predict completion tokens, and has the
    output head call `read` with them.
    """

    def __init__(
        self, lm: nn.Module, *, layout: Layout, shares: bool = True, offloads: bool = False, longest_row: int = 0
    ) -> None:
        super().__init__()
        self.shares = shares and layout in SHARING
        self.lm, self.layout, self.offloads, self.longest_row = lm, layout, offloads, longest_row
        head = self.causal.get_output_embeddings()
        name = next(name for name, module in self.causal.named_modules() if module is head)
        # What stands between the head's product and the logits: Cohere multiplies by `logit_scale`, Granite divides by
        # `logits_scaling`, Gemma soft-caps. `logits_check` finds models that do anything else.
        config = text_settings(self.causal.config)
        scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
        transforms = {"scale": scale, "softcap": config.get("final_logit_softcapping")}
        self.causal.set_submodule(name, OutputHead(head, transforms))
        self.meter = PassMeter(cost_of(self.causal))

    @property
    def causal(self) -> PreTrainedModel:
        return causal_of(self.lm)

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.lm, PeftModel)

    @property
    def head(self) -> OutputHead:
        return self.causal.get_output_embeddings()

    def forward(self, batch: TokenBatch, read: Read) -> tuple[Any, ...]:
        trains = torch.is_grad_enabled()
        repeats = trains and self.training and self.causal.is_gradient_checkpointing
        self.meter.add_pass(batch.lengths, len(batch.predict_N), trains=trains, repeats=repeats, shared=batch.shared)
        with OffloadActivations() if self.offloads else nullcontext():
            run = run_rows if self.shares or not batch.shared else run_whole_rows
            decoder, shared = self.causal.get_decoder(), batch.shared
            hidden_LD = run(decoder, batch.input_ids_L, batch.lengths, layout=self.layout, shared=shared)
        return self.head(hidden_LD.index_select(0, batch.predict_N), read)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The weights as loaded, while it is open. Needs an adapter."""
        assert isinstance(self.lm, PeftModel), "adapter_off needs LoRA"
        with self.lm.disable_adapter():
            yield


def score_tokens(
    module: nn.Module, policy: Policy, batch: TokenBatch, *, keeps_head: bool, copies: bool
) -> TokenScores:
    """Hidden states of `batch` without gradient. `module` is the policy, or DeepSpeed's engine around it.

    `keeps_head` returns the output head as it is now beside them, needed when other weights are swapped in by the time
    the loss reads it; as a copy where `copies`, because ZeRO-3 frees the weight after the call.
    """

    def read(hidden_ND: Tensor, head: Head) -> tuple[Any, ...]:
        if not keeps_head:
            return (hidden_ND,)
        # As plain tensors: DeepSpeed's hooks look for tensors in what a module returns, not into a Head.
        own = head.detached(copy=copies)
        return hidden_ND, own.weight_VD, own.bias_V

    with torch.no_grad():
        hidden_ND, *weights = module(batch, read)
    return TokenScores(hidden_ND, Head(*weights, **policy.head.transforms) if keeps_head else None)


@dataclass(frozen=True)
class FrozenModel:
    """A second model that only scores, with its own weights and its own head: the teacher of on-policy distillation."""

    policy: Policy
    module: nn.Module  # the policy, or DeepSpeed's engine around it
    sharded: bool
    rows: int  # of the student's head: a table that is padded further is compared over these

    def score(self, batch: TokenBatch) -> TokenScores:
        scores = score_tokens(self.module, self.policy, batch, keeps_head=True, copies=self.sharded)
        assert scores.head is not None
        return replace(scores, head=scores.head.first_rows(self.rows))
