"""What DeepSpeed is told: its configuration, the learning rate of an update, and the scale of the loss in float16."""

from __future__ import annotations

import math
from typing import Any

import torch

from opsd_cli.settings.config import OptimSettings, ZeroSettings

FIRST_POWER = 16  # of two: the loss scale a run begins with, as in PyTorch's and DeepSpeed's defaults
SMALLEST_SCALE = 1
WINDOW = 200  # updates without an overflow after which the loss scale is doubled
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter")  # of DeepSpeed's loss scaler: what a resume needs
NO_TIMERS = {"throughput": {"enabled": False, "synchronized": False}}
"""Unset, DeepSpeed waits for the card before every forward pass, to tell a throughput that nobody asked for."""


def effective_stage(zero: ZeroSettings, dtype: torch.dtype, *, ranks: int) -> int:
    """The stage DeepSpeed is told, which is not always the one in the settings."""
    # In half precision at least stage 2, the lowest at which DeepSpeed accumulates gradients in fp32 with the optimizer
    # it uses at every other stage: with fp32 accumulation stage 1 takes its older BF16_Optimizer instead, and stage 0
    # one whose first update is wrong (measured).
    if dtype.itemsize == 2:
        return max(2, zero.stage)
    # One rank in fp32 has nobody to share with: stages 1 and 2 would only add a second copy of weights and gradients.
    alone = ranks == 1 and zero.stage in (1, 2) and zero.offload_optimizer == "none"
    return 0 if alone else zero.stage


def learning_rate(step: float, optim: OptimSettings, *, steps: int) -> float:
    """Linear warm-up over `warmup_steps` updates, then the schedule down to 0 after the last. `step` from 0; between
    two steps where time decides (`training.time_budget`)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return optim.lr * shapes[optim.schedule]


def deepspeed_config(zero: ZeroSettings, optim: OptimSettings, *, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration for training. Nothing is left to DeepSpeed's defaults that changes the result."""
    bucket = zero.bucket_mib * 2**20 // dtype.itemsize
    sharding: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": zero.overlap,
    }
    if zero.offload_optimizer == "cpu":
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        # At threshold 0 no parameter stays whole between uses, so a copy of the shards is a copy of the weights: a
        # teacher that is one is refused above it (`checks`).
        sharding |= {
            "stage3_param_persistence_threshold": zero.persist_below,
            "stage3_prefetch_bucket_size": bucket,
        }
        if zero.hpz_ranks > 1:
            sharding["zero_hpz_partition_size"] = zero.hpz_ranks
        if zero.offload_parameters == "cpu":
            sharding["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # Neither count matters: opsd forms the batches and marks the last micro-batch of an update itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # At stage 0 in fp32 DeepSpeed reports no norm, so the engine clips itself.
        "gradient_clipping": 0.0 if stage == 0 else optim.max_grad_norm,
        "bf16": {
            "enabled": dtype is torch.bfloat16,
            "bf16_master_weights_and_grads": optim.state_dtype == "bfloat16",
            "bf16_optimizer_states": optim.state_dtype == "bfloat16",
        },
        # Unset, both mean the model's type: micro-batches and ranks would be added up in 8 bits.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "fp16": fp16_section(dtype),
        "zero_optimization": sharding,
        # The optimizer stays torch's AdamW when it is offloaded: DeepSpeed's own would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "timers": NO_TIMERS,
        "wall_clock_breakdown": False,
    }


def frozen_config(placement: str, *, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration for a model that only scores: stage 3 without an optimizer, shards on the GPU or the CPU."""
    sharding: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if placement == "offloaded":
        sharding["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "fp16": fp16_section(dtype),
        "zero_optimization": sharding,
        "steps_per_print": 2**62,
        "timers": NO_TIMERS,
    }


def fp16_section(dtype: torch.dtype) -> dict[str, Any]:
    """The loss is multiplied by a scale so that small gradients do not vanish in float16; DeepSpeed divides by it."""
    if dtype is not torch.float16:
        return {"enabled": False}
    return {
        "enabled": True,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": FIRST_POWER,
        "min_loss_scale": SMALLEST_SCALE,
        "hysteresis": 1,  # every overflow halves
        # DeepSpeed's own growth is off: it doubles the scale before it divides the gradient by it, so that this one
        # update is made of half the gradient (measured with 0.19.8; docs/notes/lab-notes.md).
        "loss_scale_window": 2**62,
    }


def start_step(scaler: Any) -> float:
    """The loss scale of the step that begins, from DeepSpeed's `DynamicLossScaler`."""
    # An overflow at the smallest scale must come back to us, who know the rollouts; DeepSpeed would end the process.
    # Set at each step, because loading a checkpoint replaces the scaler.
    scaler.raise_error_at_min_scale = False
    return float(scaler.cur_scale)


def settle_step(scaler: Any, *, scale: float, overflow: bool) -> bool:
    """After a step at `scale`: whether it overflowed and can be repeated at half the scale, which DeepSpeed has set.
    An overflow is no fault of data or model; only at the smallest scale is the gradient itself not finite."""
    if overflow and scale > SMALLEST_SCALE:
        return True
    updates = scaler.cur_iter - scaler.last_overflow_iter - 1
    if overflow:
        scaler.cur_scale = 2.0**FIRST_POWER  # the scale is not to blame, so it starts again
    elif updates > 0 and updates % WINDOW == 0:
        scaler.cur_scale *= scaler.scale_factor
    return False
