"""The parts of opsd that the checks put together: models with random weights, an engine, rollouts and their gradient.
The one file to change when those parts move."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import opsd_cli.plugins  # noqa: F401  (registers divergences, teachers and samplers)
from gpu_checks.check import Bench
from gpu_checks.loss_rows import EVERY_TOKEN
from opsd_cli.data.pairing import PairedBatch, Weighed, pair
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source, add_adapter
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import Ranks, alone, connect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.launch.rank_environ import free_port
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.loss.divergences import Divergence
from opsd_cli.loss.types import TokenLoss, Update
from opsd_cli.settings.config import LoraSettings, OptimSettings, ZeroSettings

NO_LORA = LoraSettings(rank=0, alpha=1, dropout=0.0, targets=("all-linear",))
LORA = LoraSettings(rank=8, alpha=16, dropout=0.0, targets=("all-linear",))
OPTIM = OptimSettings(
    lr=1e-4,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.0,
    schedule="constant",
    warmup_steps=0,
    max_grad_norm=1e9,
    state_dtype="float32",
)
END_ID, PAD_ID = 1, 0


@cache
def ranks_of(device: torch.device) -> Ranks:
    """The process group of this one rank, made as a run makes it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(os.environ))}
    return connect(device)


# Models ---------------------------------------------------------------------------------------------------------------


def qwen3(*, hidden: int, layers: int, heads: int, kv_heads: int, head_size: int, vocabulary: int, tied: bool = True):
    """A Qwen3 of this shape."""
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_size, max_position_embeddings=4096,
        tie_word_embeddings=tied, pad_token_id=PAD_ID, eos_token_id=END_ID,
    )  # fmt: skip


def random_model(config: Qwen3Config, *, dtype: torch.dtype, device: torch.device, spread: float = 0.3):
    """Weights that are far enough from zero for every part of the forward pass to show in the logits; the same on every
    device, and in every type up to its rounding."""
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(spread * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return converted(made, dtype=dtype, device=device)


def converted(model: PreTrainedModel, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A copy in another type or place. Buffers stay what they are: `Module.to` would round the rotation's too."""
    twin = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=dtype, attn_implementation="sdpa").eval()
    twin.load_state_dict(model.state_dict())
    return twin.to(device)


def policy_of(
    causal: PreTrainedModel, lora: LoraSettings, *, seed: int = 3, second_factor: float = 0.05, checkpointing=False
) -> Policy:
    """The model as a policy. An adapter's second factor is not left at zero, where the first would have no gradient."""
    layout = usable_layout(causal, alone()).layout
    lm = add_adapter(causal, lora, seed=seed)
    policy = Policy(lm, layout=layout)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(second_factor * torch.randn(parameter.shape, generator=generator))
    if checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


# Engine ---------------------------------------------------------------------------------------------------------------


class WatchedEngine(ZeroEngine):
    """The engine of a run; when `watch` is set it is called before each update, with the gradient still there."""

    watch: Callable[[], None] = staticmethod(lambda: None)

    def step(self, step: int) -> Update:
        self.watch()
        return super().step(step)


def engine_of(
    causal: PreTrainedModel,
    bench: Bench,
    *,
    stage: int,
    lora: LoraSettings = NO_LORA,
    offload: bool = False,
    checkpointing: bool = False,
    gather: Literal["auto", "model", "layer"] = "auto",
) -> WatchedEngine:
    """DeepSpeed around the model, as `rank.build` puts it together."""
    dtype = causal.get_input_embeddings().weight.dtype
    source = Source("random weights", None, dtype, "sdpa", False, True)
    policy = policy_of(causal, lora, checkpointing=checkpointing)
    zero = ZeroSettings(
        stage=stage,
        offload_optimizer="cpu" if offload else "none",
        offload_parameters="cpu" if offload and stage == 3 else "none",
        bucket_mib=64,
        hpz_ranks=1,
        overlap=False,
        persist_below=0,
        gather=gather,
    )
    return WatchedEngine(
        policy, GenerationView(policy, source, lora), ranks_of(bench.device), zero=zero, optim=OPTIM, steps=10,
        device=bench.device, source=source,
    )  # fmt: skip


def gradients(engine: ZeroEngine) -> dict[str, Tensor]:
    """The accumulated gradient of every trained parameter, whole, in fp32 on the CPU."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, parameter in engine.policy.named_parameters():
        if parameter.requires_grad:
            whole = parameter.grad if engine.stage == 0 else safe_get_full_grad(parameter)
            found[name] = whole.detach().float().cpu()
    return found


def plain_objective(divergence: Divergence, *, temperature: float, chunk_bytes: int) -> Objective:
    """A divergence over the whole vocabulary, for every token, and nothing else."""
    return Objective(divergence, EVERY_TOKEN, None, temperature, chunk_bytes, wide_logits=False)


# Rollouts and their loss ----------------------------------------------------------------------------------------------


def ids(count: int, vocabulary: int, seed: int) -> tuple[int, ...]:
    """Random tokens that are neither padding nor the end."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, vocabulary, (count,), generator=generator).tolist())


def prompt_pairs(count: int, vocabulary: int, *, student: int, teacher: int) -> list[PromptPair]:
    """Prompts of about these lengths, no two alike."""
    problem = Problem(id="random", question="", solution="", answer=None)
    return [
        PromptPair(problem, ids(student + i % 7, vocabulary, 2 * i), ids(teacher + i % 5, vocabulary, 2 * i + 1))
        for i in range(count)
    ]


def random_rollouts(pairs: Sequence[PromptPair], vocabulary: int, *, length: int) -> list[Rollout]:
    """One completion of `length` to 1.5 times as many tokens for each."""
    return [
        Rollout(prompts, ids(length + (3 * i) % (length // 2 + 1), vocabulary, 1000 + i), "stop", (), i)
        for i, prompts in enumerate(pairs)
    ]


def weighed(rollouts: Sequence[Rollout]) -> list[Weighed]:
    return [(rollout, [1.0] * len(rollout.completion_ids)) for rollout in rollouts]


def in_pieces(rollouts: Sequence[Rollout], pieces: int, device: torch.device) -> list[PairedBatch]:
    """So many micro-batches of about as many rollouts each."""
    rows = weighed(rollouts)
    return [batch.to(device) for batch in pair([rows[i::pieces] for i in range(pieces)])]


def loss_of(engine: ZeroEngine, teacher, batch: PairedBatch, *, divergence, temperature: float = 1.0) -> TokenLoss:
    """The objective of a micro-batch with gradient, in chunks of a few megabytes."""
    return engine.student_loss(
        batch,
        teacher.score(batch.teacher),
        plain_objective(divergence, temperature=temperature, chunk_bytes=16 * 2**20),
    )
