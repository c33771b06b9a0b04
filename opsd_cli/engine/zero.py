"""DeepSpeed ZeRO around the policy: sharding, the one normalisation of the gradient, the optimizer update. The
only file that imports deepspeed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsd_cli.data.pairing import PairedBatch, TokenBatch
from opsd_cli.engine import zero_config
from opsd_cli.engine.base import PolicyEngine, load_frozen
from opsd_cli.engine.deepspeed_internals import compiling_nothing, drop_gradients, held_weights, shard_in_turn
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source
from opsd_cli.engine.model_limits import table_of
from opsd_cli.engine.placement import move_buffers, why_by_layer
from opsd_cli.engine.policy import FrozenModel, Policy
from opsd_cli.engine.process_group import Ranks
from opsd_cli.engine.training_state import Held, load_state, save_state
from opsd_cli.engine.update_norm import squared_update
from opsd_cli.engine.weight_copies import is_sharded, trainable
from opsd_cli.loss.types import ComputesLoss, TokenLoss, TokenMixture, TokenScores, Update
from opsd_cli.settings.config import OptimSettings, ZeroSettings
from opsd_cli.settings.errors import ConfigError

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402


class ZeroEngine(PolicyEngine):
    """The policy, sharded and trainable."""

    def __init__(
        self,
        policy: Policy,
        view: GenerationView,
        ranks: Ranks,
        *,
        zero: ZeroSettings,
        optim: OptimSettings,
        steps: int,
        device: torch.device,
        source: Source,
    ) -> None:
        super().__init__(policy, view, ranks, optim=optim, steps=steps, device=device, source=source)
        self.stage = zero_config.effective_stage(zero, source.dtype, ranks=ranks.world_size)
        self.sharded_from: torch.device | None = None  # where all weights were before; None: they are not sharded
        self._offloaded, self._overlaps = zero.offload_optimizer == "cpu", zero.overlap
        config = zero_config.deepspeed_config(zero, optim, stage=self.stage, dtype=source.dtype)
        parameters = list(trainable(policy).values())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip
        buffer_types = {name: buffer.dtype for name, buffer in policy.named_buffers()}
        if source.dtype is torch.float16 and not get_accelerator().is_fp16_supported():
            raise ConfigError(
                f"model.dtype is float16, in which this device ({device}) cannot train; use model.dtype=float32"
            )
        if optim.state_dtype == "bfloat16" and source.dtype is not torch.bfloat16:
            raise ConfigError(
                f"optim.state_dtype=bfloat16 needs weights in bfloat16, and model.dtype is {source.dtype} here; use "
                "optim.state_dtype=float32"
            )
        # The shared-memory op only serves inference and would need a compiler on this machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        with compiling_nothing():
            if self.stage == 3:
                self.sharded_from = next(policy.parameters()).device
                shard(policy, config, device=device, dtype=source.dtype)
            self._ds, self._optimizer, _, _ = deepspeed.initialize(
                model=policy,
                optimizer=optimizer,
                model_parameters=parameters,
                config=config,
            )
        # Rotary frequencies in bfloat16 would be off by a radian after some hundred positions.
        changed = [name for name, buffer in policy.named_buffers() if buffer.dtype != buffer_types[name]]
        assert not changed, f"DeepSpeed has changed the type of buffers: {changed}"
        if self.stage == 3:
            self.gathers_layers = why_by_layer(zero.gather, policy.parameters(), device, ranks)

    # Forwards -----------------------------------------------------------------------------------------------------

    def student_loss(
        self, batch: PairedBatch, target: TokenScores | TokenMixture | None, objective: ComputesLoss
    ) -> TokenLoss:
        """The objective of a micro-batch, with gradient. It is computed inside the call of the output head, where the
        head's weight is whole at every stage."""
        self.policy.train()
        return TokenLoss(*self._ds(batch.student, partial(objective, batch=batch, target=target)))

    def score(self, batch: TokenBatch, *, own_head: bool = False) -> TokenScores:
        """Hidden states without gradient. `own_head` keeps the head of the weights in force now, which is needed
        when they are swapped out before the loss reads it."""
        return self._score(batch, own_head=own_head, copies=self.stage == 3)

    @property
    def keeps_addresses(self) -> bool:
        """Whether `generating` gives parameters at the same addresses each time, updated in place."""
        return self.stage < 3

    def _gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        """Gather sharded parameters, to read. Collective where any is sharded."""
        if not any(is_sharded(parameter) for parameter in parameters):
            return nullcontext()
        # Without a rank that modifies them, nothing is sent back when the context ends.
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)

    # One update -----------------------------------------------------------------------------------------------------

    def backward(self, weighted_sum: Tensor, *, denominator: float, last: bool) -> None:
        """Accumulate the gradient of weighted_sum / denominator: the only normalisation in the program. `last` marks
        the update's last micro-batch."""
        self._ds.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks, so the sum is multiplied by their number. Its own scaling by the number of
        # micro-batches depends on how the loss was computed, so it is off.
        self._ds.backward(weighted_sum * (self.ranks.world_size / denominator), scale_wrt_gas=False)

    def step(self, step: float) -> Update:
        """Clip, update, clear. `step` counts from 0 and decides the learning rate. A gradient that is not finite is
        cleared and refused, on every rank."""
        lr = self.learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss_scale = zero_config.start_step(self._optimizer.loss_scaler) if self.source.dtype is torch.float16 else None
        if self.stage == 0:
            # In fp32 without sharding DeepSpeed neither reports the norm nor refuses an update, so it is done here.
            parameters = trainable(self.policy).values()
            grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.optim.max_grad_norm))
            if math.isfinite(grad_norm):
                self._ds.step()
            else:
                self.drop_gradients()
        else:
            self._ds.step()
            overflow = self._optimizer.overflow
            grad_norm = math.inf if overflow else float(self._ds.get_global_grad_norm())
            # With the optimizer offloaded DeepSpeed keeps the fp32 gradient that it has just refused, and every later
            # update would be refused too.
            if overflow:
                self.drop_gradients()
        finite, again = math.isfinite(grad_norm), False
        moved = self._moved(lr) if finite else 0.0
        if loss_scale is not None:
            again = zero_config.settle_step(self._optimizer.loss_scaler, scale=loss_scale, overflow=not finite)
        refused = "" if finite or again else "gradient"
        return Update(lr, grad_norm, refused, overflow=again, loss_scale=loss_scale, update_norm=moved)

    def _moved(self, lr: float) -> float:
        """How far the update just made has moved the weights. Collective."""
        # Without sharding every rank holds all weights; else each holds its part.
        mine = squared_update(self._adam, lr=lr, settings=self.optim)
        return math.sqrt(mine if self.stage == 0 else self.ranks.all_sum([mine])[0])

    def drop_gradients(self) -> None:
        """Discard what `backward` has accumulated since the last update, also when it was interrupted (at stage 3 on
        one rank only: others would wait for it in a collective). To be called on every rank."""
        parameters = trainable(self.policy).values()
        if self._overlaps and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a bucket that is being reduced cannot be cleared
        drop_gradients(self._optimizer, parameters, stage=self.stage, offloaded=self._offloaded)

    def load_other(self, path: str, revision: str | None, *, placement: str) -> FrozenModel:
        """Another model that only scores: whole on every rank, sharded over them, or streamed from the CPU."""
        other = self.ranks.node.once(partial(self.source.beside, path, revision))
        # Its layout is tried where it is loaded, which is the CPU where DeepSpeed moves the weights afterwards. What
        # cannot be tried there (flash attention) is not used.
        device = self.device if placement == "replicated" else torch.device("cpu")
        policy, rows = load_frozen(other, self.source, self.ranks, device=device, longest=self.policy.longest_row)
        self.rows_of_others.append(rows)
        self.meter.include(policy.meter)
        own_rows = table_of(self.policy.causal.config)
        if placement == "replicated":
            return FrozenModel(policy, policy, sharded=False, rows=own_rows)
        config = zero_config.frozen_config(placement, dtype=other.dtype)
        move_buffers(policy, self.device)
        shard(policy, config, device=self.device, dtype=other.dtype)
        module, *_ = deepspeed.initialize(model=policy, config=config)
        return FrozenModel(policy, module, sharded=True, rows=own_rows)

    def save(self, folder: Path) -> None:
        """Write this rank's share of the trained weights and of the optimizer's state. Nothing is communicated."""
        scaler = self._optimizer.loss_scaler if self.source.dtype is torch.float16 else None
        save_state(
            folder, self._held(), self._adam, self.ranks, each_has_all=self.stage == 0,
            loss_scale={key: getattr(scaler, key) for key in zero_config.SCALE} if scaler else None,
        )  # fmt: skip

    def load(self, folder: Path) -> None:
        """The inverse of `save`, whatever number of ranks and stage it was written at. Raises DataError for a
        checkpoint of another model."""
        self.drop_gradients()  # and, at stage 3, keep no parameter whole that the shards would no longer be like
        scale = load_state(folder, self._held(), self._adam, trainable(self.policy.lm))
        for key, value in (scale or {}).items():
            setattr(self._optimizer.loss_scaler, key, value)

    def _held(self) -> list[Held]:
        return held_weights(self._optimizer, trainable(self.policy.lm), stage=self.stage, ranks=self.ranks)

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer that updates weights: at stage 0 DeepSpeed hands out ours, above it wraps it."""
        return self._optimizer if self.stage == 0 else self._optimizer.optimizer


def shard(policy: Policy, config: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> None:
    """Before DeepSpeed takes a policy whole: it would move all of it to the card first. Collective."""
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
    shard_in_turn(init, policy, device=device, dtype=dtype)
