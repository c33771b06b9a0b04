"""Steps of the real loop at the shape of a real model, in this process: weights are drawn where they are used, so that
nothing of their size passes through the host or a disk. What `memory.py --gpu` and `step.py --gpu` share; owns no case.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_checks import build, random_steps
from gpu_checks.check import Bench

from opsd_cli.data.problems import PromptPair
from opsd_cli.settings.config import LoraSettings
from opsd_cli.training.loop import Parts

LORA = LoraSettings(rank=16, alpha=32, dropout=0.0, targets=("all-linear",))


def random_model(shape: dict[str, int], device: torch.device) -> PreTrainedModel:
    """A Qwen3 of this shape with random weights in bfloat16, made on `device`."""
    config = Qwen3Config(**shape, max_position_embeddings=4096, pad_token_id=build.PAD_ID, eos_token_id=build.END_ID)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def parts_of(
    shape: dict[str, int], device: torch.device, pairs: Sequence[PromptPair], *, adapter: str, words: Sequence[str]
) -> tuple[Parts, build.WatchedEngine]:
    """A step of `opsd train` on such a model at ZeRO stage 2, with checkpointing; `adapter` is lora or full."""
    return random_steps.parts_of(
        random_model(shape, device), Bench(device, Path()), pairs, words=words, stage=2,
        lora=LORA if adapter == "lora" else build.NO_LORA, checkpointing=True,
    )  # fmt: skip


def parameters(shape: dict[str, int]) -> int:
    """Weights of a Qwen3 of this shape, without its norms."""
    vocabulary = shape["vocab_size"] * shape["hidden_size"] * (1 if shape["tie_word_embeddings"] else 2)
    heads = shape["num_attention_heads"] + shape["num_key_value_heads"]
    layer = shape["hidden_size"] * (2 * heads * shape["head_dim"] + 3 * shape["intermediate_size"])
    return vocabulary + shape["num_hidden_layers"] * layer
