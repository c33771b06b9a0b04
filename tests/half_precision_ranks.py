"""Run by test_half_precision on one or two ranks: the gradient of one bfloat16 update through DeepSpeed, at every ZeRO
stage, with all weights and with LoRA, from 1, 4 and 8 micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from gradient_ranks import DIVERGENCES, OPTIM, TEACHERS, WEIGH, Variant, make_policy, source_of
from support import plain_objective
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opsd_cli.data.pairing import PairedBatch, pair
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.types import Update
from opsd_cli.settings.config import ZeroSettings

ROLLOUTS = 8
VOCABULARY = 997
SPLITS = (1, 4, 8)  # micro-batches of one rank; two ranks make at least one each, and as many in all
PACKED = "packed_2"  # with torch's attention, whose kernel on a CPU depends on what runs together; the others without
VARIANTS = [  # in half precision the stages 0 and 1 are run as stage 2
    Variant("all_1", 1),
    Variant("all_2", 2, tied=False),
    Variant("all_checkpointing_tiles_3", 3, tied=False, checkpointing=True, tiles=3),
    Variant("lora_tiles_0", 0, lora=True, divergence="jsd", tiles=3),
    Variant("lora_3", 3, lora=True, divergence="jsd"),
    Variant("offloaded_2", 2, offloaded=True, divergence="reverse_kl"),
    Variant("offloaded_3", 3, offloaded=True, divergence="reverse_kl"),
    Variant(PACKED, 2),
]


def make_model(folder: Path, *, tied: bool) -> None:
    """A two-layer Qwen3 in bfloat16, wide enough that a CPU's products of one row are made like those of many."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=tied,
        initializer_range=0.15, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)


def make_rollouts() -> list[Rollout]:
    """Of unequal lengths, none cut."""
    generator = torch.Generator().manual_seed(7)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())

    problem = Problem(id="p", question="q", solution="s", answer="1")
    return [
        Rollout(PromptPair(problem, ids(3 + i % 7), ids(9 + i % 11)), ids(4 + 3 * (i % 5)), "stop", ())
        for i in range(ROLLOUTS)
    ]


def make_engine(root: Path, variant: Variant, ranks: Ranks, *, state_dtype: str = "float32") -> ZeroEngine:
    attention = "sdpa" if variant.name == PACKED else "eager"
    source = replace(source_of(root, variant), dtype=torch.bfloat16, attention=attention)
    policy, lora = make_policy(source, variant)
    offload = "cpu" if variant.offloaded else "none"
    return ZeroEngine(
        policy, GenerationView(policy, source, lora), ranks,
        zero=ZeroSettings(
            stage=variant.stage, offload_optimizer=offload, offload_parameters="none", bucket_mib=1, hpz_ranks=1,
            overlap=False, persist_below=0,
                gather="auto",
        ),
        optim=replace(OPTIM, state_dtype=state_dtype, warmup_steps=0), steps=4, device=torch.device("cpu"),
        source=source,
    )  # fmt: skip


def micro_batches(ranks: Ranks, *, count: int) -> list[PairedBatch]:
    """This rank's rollouts in so many pieces."""
    mine = make_rollouts()[ranks.rank :: ranks.world_size]
    return pair([[(rollout, WEIGH(rollout)) for rollout in mine[i::count]] for i in range(count)])


def gradient_of(
    engine: ZeroEngine, variant: Variant, batches: Sequence[PairedBatch], *, drop: bool = True
) -> dict[str, Tensor]:
    """What these micro-batches add up to, whole and in fp32, by name; no update is made, and unless `drop` is false
    they are forgotten."""
    teacher = TEACHERS[variant.teacher].build(engine)
    n_tokens = float(sum(len(rollout.completion_ids) for rollout in make_rollouts()))
    for index, batch in enumerate(batches):
        loss = engine.student_loss(
            batch,
            teacher.score(batch.teacher),
            plain_objective(DIVERGENCES[variant.divergence], temperature=1.3, chunk_bytes=2**20),
        )
        engine.backward(loss.weighted_sum, denominator=n_tokens, last=index == len(batches) - 1)
    trained = ((name, p) for name, p in engine.policy.named_parameters() if p.requires_grad)
    gradient = {name: deepspeed.utils.safe_get_full_grad(p).float().clone() for name, p in trained}
    if drop:
        engine.drop_gradients()
    return gradient


def main(root: Path) -> None:
    """Leaves the gradients of each way of splitting, and the sum, in fp32, of those of single micro-batches."""
    ranks = connect(torch.device("cpu"))
    for variant in VARIANTS:
        engine = make_engine(root, variant, ranks)
        found = {
            str(count): gradient_of(engine, variant, micro_batches(ranks, count=max(1, count // ranks.world_size)))
            for count in SPLITS
        }
        if ranks.world_size == 1:
            parts = [gradient_of(engine, variant, [batch]) for batch in micro_batches(ranks, count=ROLLOUTS)]
            found["sum"] = {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}
        if ranks.rank == 0:
            torch.save(found, root / f"half_{variant.name}_{ranks.world_size}.pt")
    for stage in (2, 3):
        made = updates_in_bfloat16(root, stage, ranks)
        if ranks.rank == 0:
            torch.save(made, root / f"half_states_{stage}_{ranks.world_size}.pt")
    disconnect()


def updates_in_bfloat16(root: Path, stage: int, ranks: Ranks) -> dict[str, Any]:
    """Two updates with AdamW's state in bfloat16: weights and gradient before each and after the last; the second one
    also by an engine that has loaded what was saved between them. And the types of what the optimizer keeps."""
    variant, folder = Variant(f"states_{stage}", stage, tied=False), root / f"states_{stage}_{ranks.world_size}"
    engine = make_engine(root, variant, ranks, state_dtype="bfloat16")
    made: dict[str, Any] = {"weights0": whole_weights(engine)}
    for number in range(2):
        if number == 1:
            engine.save(folder)
        made[f"gradient{number}"], update = one_update(engine, variant, ranks, number)
        made[f"clipped_from{number}"] = update.grad_norm
        made[f"weights{number + 1}"] = whole_weights(engine)
    resumed = make_engine(root, variant, ranks, state_dtype="bfloat16")
    resumed.load(folder)
    one_update(resumed, variant, ranks, 1)
    made["resumed"] = whole_weights(resumed)
    zero = engine._optimizer
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    moments = [tensor for kept in zero.optimizer.state.values() for tensor in kept.values() if tensor.numel() > 1]
    made["types"] = {tensor.dtype for tensor in (*masters, *moments)}
    made["moments"] = len(moments)
    return made


def one_update(engine: ZeroEngine, variant: Variant, ranks: Ranks, number: int) -> tuple[dict[str, Tensor], Update]:
    gradient = gradient_of(engine, variant, micro_batches(ranks, count=2), drop=False)
    return gradient, engine.step(number)


def whole_weights(engine: ZeroEngine) -> dict[str, Tensor]:
    return {f"lm.{name}": tensor.clone() for name, tensor in engine.whole_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
