"""An engine without DeepSpeed: one process, whole weights, torch's AdamW. For notebooks, tests and debugging; what
`training` and the teachers ask of an engine is the same, and so are the numbers, in float32."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from opsd_cli.data.pairing import PairedBatch, TokenBatch
from opsd_cli.engine.base import PolicyEngine, load_frozen
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source
from opsd_cli.engine.model_limits import table_of
from opsd_cli.engine.policy import FrozenModel, Policy
from opsd_cli.engine.process_group import Ranks
from opsd_cli.engine.training_state import held_whole, load_state, save_state
from opsd_cli.engine.update_norm import squared_update
from opsd_cli.engine.weight_copies import trainable
from opsd_cli.loss.types import ComputesLoss, TokenLoss, TokenMixture, TokenScores, Update
from opsd_cli.settings.config import OptimSettings
from opsd_cli.settings.errors import ConfigError


class PlainEngine(PolicyEngine):
    """The policy, whole and trainable, in this process alone. Raises ConfigError for float16, whose loss needs a
    scale."""

    keeps_addresses = True

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
        assert ranks.world_size == 1, "the plain engine is one process"
        if source.dtype is torch.float16:
            raise ConfigError("the plain engine does not train in float16; use model.dtype=float32 or bfloat16")
        super().__init__(policy, view, ranks, optim=optim, steps=steps, device=device, source=source)
        self._optimizer = torch.optim.AdamW(
            list(trainable(policy).values()),
            lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip

    def student_loss(
        self, batch: PairedBatch, target: TokenScores | TokenMixture | None, objective: ComputesLoss
    ) -> TokenLoss:
        """The objective of a micro-batch, with gradient."""
        self.policy.train()
        return TokenLoss(*self.policy(batch.student, partial(objective, batch=batch, target=target)))

    def score(self, batch: TokenBatch, *, own_head: bool = False) -> TokenScores:
        """Hidden states without gradient; `own_head` keeps the head of the weights in force now beside them."""
        return self._score(batch, own_head=own_head, copies=False)

    def backward(self, weighted_sum: Tensor, *, denominator: float, last: bool) -> None:
        """Accumulate the gradient of weighted_sum / denominator."""
        (weighted_sum / denominator).backward()

    def step(self, step: float) -> Update:
        """Clip, update, clear. `step` counts from 0 and decides the learning rate. A gradient that is not finite is
        cleared and refused."""
        lr = self.learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = float(torch.nn.utils.clip_grad_norm_(trainable(self.policy).values(), self.optim.max_grad_norm))
        moved = 0.0
        if math.isfinite(norm):
            self._optimizer.step()
            moved = math.sqrt(squared_update(self._optimizer, lr=lr, settings=self.optim))
        self.drop_gradients()
        return Update(lr, norm, "" if math.isfinite(norm) else "gradient", update_norm=moved)

    def drop_gradients(self) -> None:
        """Discard what `backward` has accumulated since the last update."""
        self._optimizer.zero_grad(set_to_none=True)

    def load_other(self, path: str, revision: str | None, *, placement: str) -> FrozenModel:
        """Another model that only scores. Raises ConfigError for one that is to be sharded or offloaded."""
        if placement != "replicated":
            raise ConfigError(f"teacher.placement={placement} needs DeepSpeed; use teacher.placement=replicated")
        other, longest = self.source.beside(path, revision), self.policy.longest_row
        policy, rows = load_frozen(other, self.source, self.ranks, device=self.device, longest=longest)
        self.rows_of_others.append(rows)
        self.meter.include(policy.meter)
        return FrozenModel(policy, policy, sharded=False, rows=table_of(self.policy.causal.config))

    def save(self, folder: Path) -> None:
        """The trained weights and the optimizer's state, as `ZeroEngine` writes them."""
        save_state(folder, held_whole(trainable(self.policy.lm)), self._optimizer, self.ranks, each_has_all=True)

    def load(self, folder: Path) -> None:
        """The inverse of `save`, also of a checkpoint that several ranks wrote at any ZeRO stage."""
        parameters = trainable(self.policy.lm)
        load_state(folder, held_whole(parameters), self._optimizer, parameters)
