"""What DeepSpeed is told, and the learning rate of an update. Owns these two translations of settings; imports no
DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

import torch

from opsd_cli.engine.loss_scale import fp16_section
from opsd_cli.settings.config import OptimSettings, ZeroSettings


def effective_stage(zero: ZeroSettings, dtype: torch.dtype, *, ranks: int) -> int:
    """The stage DeepSpeed is told, which is not always the one asked for.

    In half precision stages 0 and 1 run as stage 2, the lowest at which DeepSpeed accumulates gradients in fp32 with
    the optimizer it uses at every other stage: with fp32 accumulation stage 1 takes its older BF16_Optimizer instead,
    and stage 0 one whose first update is wrong (measured). One rank in fp32 runs stages 1 and 2 as stage 0: there is
    nobody to share with, and they would add a second copy of the weights and gradients and the time to copy them.
    """
    if dtype.itemsize == 2:
        return max(2, zero.stage)
    alone = ranks == 1 and zero.stage in (1, 2) and zero.offload_optimizer == "none"
    return 0 if alone else zero.stage


def learning_rate(step: int, optim: OptimSettings, *, steps: int) -> float:
    """Linear warm-up over `warmup_steps` updates, then the schedule down to 0 after the last one. `step` from 0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return optim.lr * shapes[optim.schedule]


def deepspeed_config(zero: ZeroSettings, optim: OptimSettings, *, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """The whole DeepSpeed configuration; nothing is left to its defaults that changes the result."""
    bucket = zero.bucket_mib * 2**20 // dtype.itemsize
    sharding: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": False,
    }
    if zero.offload_optimizer == "cpu":
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        # Threshold 0: no parameter stays whole between uses, so a copy of the shards is a copy of the weights.
        sharding |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket}
        if zero.offload_parameters == "cpu":
            sharding["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if stage == 0 else optim.max_grad_norm,
        "bf16": {"enabled": dtype is torch.bfloat16},
        # Unset, both mean the model's type: micro-batches and ranks would be added up in 8 bits.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "fp16": fp16_section(dtype),
        "zero_optimization": sharding,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }


def frozen_config(placement: str, *, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed for a model that is only scored: stage 3 without an optimizer, its shards on the GPU or the CPU."""
    sharding: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if placement == "offloaded":
        sharding["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "fp16": fp16_section(dtype),
        "zero_optimization": sharding,
        "steps_per_print": 2**62,
    }
