"""Run by test_gradients on one or two ranks: takes two updates through DeepSpeed for every variant and leaves, on rank
0, the gradients of each and the weights after them. Also builds the same things for the oracle."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from support import plain_objective, token_rules
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opsd_cli.data.microbatches import plan_microbatches
from opsd_cli.data.pairing import PairedBatch, Weighed, filler_batch, pair
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.engine import small_cards
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source, add_adapter, load_causal
from opsd_cli.engine.packed import Layout, usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import alone, connect, disconnect
from opsd_cli.engine.small_cards import tile_mlps
from opsd_cli.loss.divergences import ForwardKL, GeneralizedJSD, ReverseKL
from opsd_cli.loss.token_weights import RolloutWeights
from opsd_cli.loss.types import TokenLoss
from opsd_cli.settings.config import LoraSettings, OptimSettings, ZeroSettings
from opsd_cli.teachers.teachers import Blend, Ema, Initial, Live, Sync

VOCABULARY = 97
OPTIM = OptimSettings(
    lr=1e-2,
    betas=(0.9, 0.95),
    eps=1e-3,
    weight_decay=0.01,
    schedule="linear",
    warmup_steps=1,
    max_grad_norm=0.5,
    state_dtype="float32",
)
STEPS = 2
WEIGH = RolloutWeights(token_rules(), mask_truncated=True, special_ids=())
DIVERGENCES = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": GeneralizedJSD(beta=0.3, normalize=False),
}


EMA_RATE = 0.3
BLEND_LIVE = 0.4
TEACHERS = {
    "initial": Initial(),
    "live": Live(),
    "ema": Ema(rate=EMA_RATE),
    "sync": Sync(every=1),
    "blend": Blend(live=BLEND_LIVE),
}


@dataclass(frozen=True)
class Variant:
    name: str
    stage: int
    tied: bool = True
    lora: bool = False
    checkpointing: bool = False
    offloads: bool = False  # what checkpointing keeps
    tiles: int = 1
    hpz: int = 1
    overlap: bool = False
    persist: int = 0
    reloads: bool = False  # before the last update another one is made, and taken back by a checkpoint
    teacher: str = "initial"
    divergence: str = "forward_kl"
    micro_batch_tokens: int = 60
    offloaded: bool = False
    dropped: bool = False  # before each update another one is begun, and forgotten
    broken: bool = False  # its last backward ends in the middle
    ranks: tuple[int, ...] = (1, 2)


# What a stage does to a plain update is tried alone; beyond that each variant has several things at once, because an
# engine costs more than an update, and on one number of ranks, where what it tries does not depend on that.
VARIANTS = [
    *(Variant(f"tied_{stage}", stage) for stage in range(4)),
    *(
        Variant(
            f"untied_dropped_{teacher}_{stage}", stage, tied=False, dropped=True, divergence="reverse_kl",
            teacher=teacher, ranks=(2,),
        )
        for stage, teacher in enumerate(("initial", "live", "initial", "live"))
    ),
    *(Variant(f"lora_{stage}", stage, lora=True, divergence="jsd") for stage in range(2)),
    Variant(
        "lora_ema_checkpointing_tiles_2", 2, lora=True, teacher="ema", checkpointing=True, tiles=2, divergence="jsd",
    ),
    Variant(
        "lora_sync_checkpointing_tiles_dropped_3", 3, lora=True, teacher="sync", checkpointing=True, tiles=3,
        dropped=True,
    ),
    *(Variant(f"ema_{stage}", stage, teacher="ema", ranks=(2,)) for stage in range(4)),
    Variant("checkpointing_offloads_tiles_1", 1, checkpointing=True, offloads=True, tiles=3, ranks=(1,)),
    Variant(
        "blend_checkpointing_tiles_3", 3, teacher="blend", checkpointing=True, tiles=2, divergence="jsd", offloads=True,
    ),
    Variant("row_by_row_2", 2, micro_batch_tokens=1, ranks=(2,)),
    *(Variant(f"dropped_offloaded_{stage}", stage, dropped=True, offloaded=True, ranks=(2,)) for stage in (1, 2, 3)),
    Variant("row_by_row_3", 3, micro_batch_tokens=1, ranks=(1,)),
    Variant("whole_batch_2", 2, micro_batch_tokens=4096, ranks=(1,)),
    Variant("lora_3", 3, lora=True, tied=False, divergence="jsd", ranks=(1,)),
    Variant("lora_ema_3", 3, lora=True, teacher="ema", divergence="reverse_kl"),
    *(Variant(f"broken_{stage}", stage, dropped=True, broken=True, ranks=(1,)) for stage in range(4)),
    Variant("broken_offloaded_2", 2, dropped=True, broken=True, offloaded=True, checkpointing=True, ranks=(1,)),
    Variant("broken_checkpointing_3", 3, dropped=True, broken=True, checkpointing=True, ranks=(1,)),
    *(Variant(f"overlap_{stage}", stage, overlap=True, dropped=True, ranks=(2,)) for stage in (1, 2, 3)),
    Variant("overlap_offloaded_2", 2, overlap=True, offloaded=True, ranks=(2,)),
    Variant("lora_overlap_2", 2, lora=True, overlap=True, divergence="jsd", ranks=(2,)),
    Variant("persist_3", 3, persist=40, overlap=True, teacher="live", dropped=True, reloads=True, ranks=(2,)),
    Variant("lora_persist_3", 3, persist=200, lora=True, divergence="jsd", reloads=True, ranks=(2,)),
    # The last, because DeepSpeed keeps the group of ranks for the rest of the process.
    Variant("hpz_initial_checkpointing_3", 3, tied=False, hpz=2, checkpointing=True, ranks=(2,)),
]  # fmt: skip


def make_model(folder: Path, *, tied: bool) -> None:
    """A two-layer Qwen3 with large random weights, so that no gradient is tiny."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.2,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def source_of(root: Path, variant: Variant) -> Source:
    folder = root / ("tied" if variant.tied else "untied")
    return Source(str(folder), None, torch.float32, "sdpa", False, False)


LAYOUTS: dict[Source, tuple[Layout, str]] = {}


def layout_of(causal: PreTrainedModel, source: Source) -> Layout:
    """The model's layout, found once for each model in a process: it takes longer than an update."""
    if source not in LAYOUTS:
        LAYOUTS[source] = usable_layout(causal, alone()).layout, causal.config._attn_implementation
    layout, attention = LAYOUTS[source]
    if causal.config._attn_implementation != attention:
        causal.set_attn_implementation(attention)
    return layout


def make_policy(source: Source, variant: Variant) -> tuple[Policy, LoraSettings]:
    causal = load_causal(source)
    lora = LoraSettings(rank=4 if variant.lora else 0, alpha=8, dropout=0.0, targets=("q_proj", "up_proj"))
    layout = layout_of(causal, source)
    lm = add_adapter(causal, lora, seed=3)
    policy = Policy(lm, layout=layout, offloads=variant.offloads)
    if variant.tiles > 1:
        assert tile_mlps(causal, variant.tiles) == causal.config.num_hidden_layers
    generator = torch.Generator().manual_seed(4)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # zero as peft makes it: then the gradient of lora_A would be zero too
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    if variant.checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy, lora


def make_rollouts(step: int) -> list[Rollout]:
    """Seven rollouts of unequal lengths, one cut by the length limit; two steps differ."""
    generator = torch.Generator().manual_seed(100 + step)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())

    problem = Problem(id="p", question="q", solution="s", answer="1")
    rollouts = []
    for i in range(7):
        prompts = PromptPair(problem, ids(3 + i), ids(9 + 2 * i))
        rollouts.append(Rollout(prompts, ids(4 + 3 * (i % 3)), "length" if i == 2 else "stop", ()))
    return rollouts


@contextmanager
def backward_that_breaks(module: torch.nn.Module) -> Iterator[None]:
    """Backward of the module fails, after later modules have had theirs."""

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = module.register_full_backward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def micro_batches(drawn: list[list[Weighed]], engine, *, max_tokens: int) -> list[PairedBatch]:
    """This rank's share of what all drew, as many micro-batches on every rank."""
    batches = pair(plan_microbatches(drawn, rank=engine.ranks.rank, max_tokens=max_tokens, padded=engine.pads))
    missing = engine.ranks.largest(max(1, len(batches))) - len(batches)
    return batches + [filler_batch(pad_id=0)] * missing


def run_variant(root: Path, variant: Variant, ranks) -> dict[str, torch.Tensor]:
    import deepspeed

    from opsd_cli.engine.zero import ZeroEngine

    source = source_of(root, variant)
    policy, lora = make_policy(source, variant)
    engine = ZeroEngine(
        policy, GenerationView(policy, source, lora), ranks,
        zero=ZeroSettings(
            stage=variant.stage, offload_optimizer="cpu" if variant.offloaded else "none", offload_parameters="none",
            bucket_mib=1, hpz_ranks=variant.hpz, overlap=variant.overlap, persist_below=variant.persist,
                gather="auto",
        ),
        optim=OPTIM, steps=STEPS, device=torch.device("cpu"), source=source,
    )  # fmt: skip
    teacher = TEACHERS[variant.teacher].build(engine)
    found: dict[str, torch.Tensor] = {}

    def make_update(step: int) -> None:
        rollouts = make_rollouts(step)[ranks.rank :: ranks.world_size]
        drawn = ranks.gather([(rollout, WEIGH(rollout)) for rollout in rollouts])
        batches = micro_batches(drawn, engine, max_tokens=variant.micro_batch_tokens)
        (n_tokens,) = ranks.all_sum([sum(batch.weight for batch in batches)])

        def loss_of(batch: PairedBatch) -> TokenLoss:
            return engine.student_loss(
                batch,
                teacher.score(batch.teacher),
                plain_objective(DIVERGENCES[variant.divergence], temperature=1.3, chunk_bytes=4 * VOCABULARY * 3),
            )

        if variant.dropped:
            for _ in range(2):
                engine.backward(loss_of(batches[0]).weighted_sum, denominator=1.0, last=False)
            last = loss_of(batches[0]).weighted_sum  # and a forward without its backward, or with half of it
            if variant.broken:
                with backward_that_breaks(policy.causal.model.layers[0].mlp), suppress(torch.OutOfMemoryError):
                    engine.backward(last, denominator=1.0, last=False)
            engine.drop_gradients()
        for index, batch in enumerate(batches):
            loss = loss_of(batch)
            engine.backward(loss.weighted_sum, denominator=n_tokens, last=index == len(batches) - 1)
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                whole = parameter.grad if variant.stage == 0 else deepspeed.utils.safe_get_full_grad(parameter)
                found[f"grad{step}/{name}"] = whole.detach().clone()
        update = engine.step(step)
        found[f"norm{step}"], found[f"update{step}"] = torch.tensor([update.grad_norm, update.update_norm])
        teacher.after_update(step + 1)

    for step in range(STEPS):
        if variant.reloads and step == STEPS - 1:
            folder = root / f"{variant.name}_saved"
            engine.save(folder)
            ranks.barrier()
            make_update(step)
            engine.load(folder)
        make_update(step)
    with engine.generating() as lm:
        for name, parameter in lm.named_parameters():
            found[f"weight/lm.{name}"] = parameter.detach().clone()
    return found


def main() -> None:
    root = Path(sys.argv[1])
    small_cards.SMALLEST = 1  # of these small models everything that is kept goes to host memory
    ranks = connect(torch.device("cpu"))
    for variant in [variant for variant in VARIANTS if ranks.world_size in variant.ranks]:
        found = run_variant(root, variant, ranks)
        if ranks.rank == 0:
            torch.save(found, root / f"{variant.name}_{os.environ['WORLD_SIZE']}.pt")
    disconnect()


if __name__ == "__main__":
    main()
