"""What every engine does alike, with DeepSpeed or without: one policy in a process, its view for generation, copies of
its weights, other models beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn

from opsd_cli.data.pairing import PairedBatch, TokenBatch
from opsd_cli.engine import zero_config
from opsd_cli.engine.device import card_of
from opsd_cli.engine.flops import PassMeter, peak_flops
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source, asked_once, load_model
from opsd_cli.engine.logits_check import check_logits
from opsd_cli.engine.model_limits import check_same_tokens
from opsd_cli.engine.neighbours import choose_layout
from opsd_cli.engine.packed import LayoutChoice
from opsd_cli.engine.policy import Policy, score_tokens
from opsd_cli.engine.process_group import Ranks
from opsd_cli.engine.weight_copies import UpdateCopy, WeightCopy, trainable
from opsd_cli.loss.types import ComputesLoss, TokenLoss, TokenMixture, TokenScores
from opsd_cli.settings.config import OptimSettings


class PolicyEngine:
    """The policy, and what a teacher and a sampler may ask of it."""

    def __init__(
        self,
        policy: Policy,
        view: GenerationView,
        ranks: Ranks,
        *,
        optim: OptimSettings,
        steps: int,
        device: torch.device,
        source: Source,
    ) -> None:
        self.policy, self.ranks, self.device, self.source = policy, ranks, device, source
        self.optim, self.steps = optim, steps
        self.rows_of_others: list[LayoutChoice] = []  # how other models' rows are run
        self._view = view

    def _score(self, batch: TokenBatch, *, own_head: bool, copies: bool) -> TokenScores:
        self.policy.eval()
        return score_tokens(self.policy, self.policy, batch, keeps_head=own_head, copies=copies)

    def compare(
        self, batch: PairedBatch, target: TokenScores | TokenMixture | None, objective: ComputesLoss
    ) -> TokenLoss:
        """The objective of a micro-batch as a measurement: as it is run, without dropout and without gradient."""
        self.policy.eval()
        with torch.no_grad():
            return TokenLoss(*self.policy(batch.student, partial(objective, batch=batch, target=target)))

    def _gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        """Make parameters whole, to read. Collective where any is sharded."""
        return nullcontext()

    gathers_layers: str = ""
    """Why `generating` gathers a layer at a time, in words; empty where its weights are whole."""

    def generating(self) -> AbstractContextManager[nn.Module]:
        """The current weights as a module to generate with. Collective at stage 3."""
        if self.gathers_layers:
            return self._view.by_layer(self._gather, self.ranks)
        return self._view.with_weights(self._gather)

    def learning_rate(self, step: float) -> float:
        """Of the update that follows `step` others."""
        return zero_config.learning_rate(step, self.optim, steps=self.steps)

    @property
    def has_adapter(self) -> bool:
        return self.policy.has_adapter

    def adapter_off(self) -> AbstractContextManager[None]:
        """The weights as loaded, while it is open. Needs an adapter."""
        return self.policy.adapter_off()

    @property
    def meter(self) -> PassMeter:
        """Of all passes in this process, those of other models too."""
        return self.policy.meter

    @property
    def peak_flops(self) -> float | None:
        """Operations a second that this rank's card could do at most; None where that is not known."""
        return peak_flops(card_of(self.device).name, self.source.dtype)

    @property
    def pads(self) -> bool:
        """Whether rows are padded to a rectangle when they are scored."""
        return self.policy.layout == "padded"

    @property
    def shares(self) -> bool:
        """Whether rows can be scored of which several share a prompt that is run once."""
        return self.policy.shares

    # Weights ------------------------------------------------------------------------------------------------------

    def copy_weights(self, *, moves: bool) -> WeightCopy:
        """A copy of the trainable weights as they are now; `moves` holds it in fp32."""
        return WeightCopy(trainable(self.policy.lm), moves=moves)

    def average_weights(self) -> WeightCopy:
        """A copy to average with: of the trainable weights, or under LoRA of what adapters add (adapter off to use)."""
        if isinstance(self.policy.lm, PeftModel):
            return UpdateCopy(self.policy.lm, self._gather)
        return self.copy_weights(moves=True)

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights under the names of the model without an adapter, an adapter merged, one at a time and on
        their own device: what vLLM loads. Collective at stage 3, where no more than a layer is whole at once."""
        return self._view.merged_by_layer(self._gather)

    def module_of(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A model of its own, adapter and all, of `weights` by the names of `whole_parameters`."""
        return self._view.module_of(weights)

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole, one at a time, as a CPU copy on rank 0 (empty elsewhere). Collective."""
        # One parameter at a time, so that no GPU holds the whole model at stage 3.
        for name, parameter in self.policy.lm.named_parameters():
            with self._gather([parameter]):
                data = parameter.data
                yield name, data.detach().to("cpu", copy=True) if self.ranks.rank == 0 else data.new_empty(0)


def load_frozen(
    other: Source, own: Source, ranks: Ranks, *, device: torch.device, longest: int = 0
) -> tuple[Policy, LayoutChoice]:
    """Another model on `device`, without gradients, and how its rows of at most `longest` tokens are run. Collective.
    Raises ConfigError unless both models have the same tokens."""
    asked_once(other, ranks, partial(check_same_tokens, own=own))
    causal = asked_once(other, ranks, partial(load_model, device=device)).causal
    rows = choose_layout(causal, ranks, longest=longest)
    policy = Policy(causal, layout=rows.layout, shares=not rows.unshared)
    check_logits(policy, other.path)
    return policy, rows
