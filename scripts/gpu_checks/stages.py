"""The checks of `methods` for the ways to hold weights and what is computed of them: ZeRO stages, offload, adapters,
what small cards need, and fp32. A group of its own, so that both are done beside each other."""

from __future__ import annotations

from gpu_checks.check import Bench, Check
from gpu_checks.methods import choices

CHOICES: dict[str, tuple[str, ...]] = {
    "stage 1": ("zero=stage1",),
    "stage 2": ("zero=stage2",),
    "stage 2, offload": ("zero=stage2_offload",),
    "stage 3": ("zero=stage3",),
    "stage 3, offload": ("zero=stage3_offload",),
    "stage 3, ema": ("zero=stage3", "teacher=ema_fast"),
    "LoRA, stage 2": ("lora=r16", "zero=stage2"),
    "LoRA, stage 3, offload": ("lora=r16", "zero=stage3_offload"),
    "LoRA, ema": ("lora=r16", "teacher=ema_fast"),
    "LoRA, checkpointing": ("lora=r16", "train.gradient_checkpointing=true"),
    "LoRA, activations in host memory": (
        "lora=r16", "train.gradient_checkpointing=true", "train.offload_activations=true",
    ),
    "MLPs in pieces": ("train.mlp_tiles=4", "train.gradient_checkpointing=true"),
    "stage 3, MLPs in pieces": ("zero=stage3", "train.mlp_tiles=4"),
    "AdamW in bf16": ("optim.state_dtype=bfloat16", "model.dtype=bfloat16"),
    "stage 3, AdamW in bf16": ("optim.state_dtype=bfloat16", "model.dtype=bfloat16", "zero=stage3"),
    "fp32, stage 2": ("model.dtype=float32", "zero=stage2"),
    "fp32, stage 3": ("model.dtype=float32", "zero=stage3"),
}  # fmt: skip
ON_A_CPU = ("stage 3", "LoRA, stage 2")


def checks(bench: Bench) -> list[Check]:
    return choices(bench, CHOICES, ON_A_CPU)
