"""What a model of the zoo goes through, in one process: loading, its checks, two steps, a resume, an export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from one_process import OneProcessEngine, parts_of, prompts
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import FAMILIES, VOCABULARY

from opsd_cli.data.pairing import pair
from opsd_cli.data.stream import stream_of
from opsd_cli.engine import agreement
from opsd_cli.engine.export import Exporter
from opsd_cli.engine.loading import find_source
from opsd_cli.engine.weight_copies import trainable
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.loss.token_weights import RolloutWeights
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, DataError
from opsd_cli.training.loop import sample, train_step

WORDS = (
    "recipe=quickstart", "teacher=initial", "divergence=reverse_kl", "train.steps=4", "train.problems_per_step=3",
    "train.rollouts_per_problem=2", "sampling.max_completion_tokens=8", "eval.max_completion_tokens=8",
    "loss.mask_truncated=false", "prompts.max_tokens=40", "train.gradient_checkpointing=true",
)  # fmt: skip
RANKS = {"all weights": 0, "lora": 4}
EXACT = 1e-4  # of the spread of logits, in fp32


@dataclass(frozen=True)
class Run:
    """How one architecture is run with all weights or with an adapter, or why it is refused."""

    layout: str = ""
    attention: str = ""
    decoder: str = ""
    refusal: str = ""


def config_for(family: str, folder: Path, base: Config, *, rank: int) -> Config:
    lora = replace(base.lora, rank=rank, alpha=8, targets=FAMILIES[family].targets)
    return replace(base, model=replace(base.model, path=str(folder)), lora=lora)


def load_family(family: str, root: Path, base: Config, *, rank: int) -> tuple[Run, OneProcessEngine | None, Config]:
    """Load a model of the zoo as a run would, and say how it is run."""
    folder = root / family
    if not folder.exists():
        FAMILIES[family].make(folder)
    config = config_for(family, folder, base, rank=rank)
    try:
        engine = OneProcessEngine(config, find_source(config.model, dtype=torch.float32), torch.device("cpu"))
        decoder = parts_of(engine, config).completer.choose_decoder()
    except (ConfigError, DataError) as error:
        return Run(refusal=str(error)), None, config
    return Run(engine.policy.layout, engine.policy.causal.config._attn_implementation, decoder), engine, config


def run_family(family: str, root: Path, base: Config, *, rank: int) -> Run:
    """Take a model through everything. Raises AssertionError where something is wrong that was not refused."""
    run, engine, config = load_family(family, root, base, rank=rank)
    if engine is None:
        return run
    check_zero_signal(engine, config)
    parts = parts_of(engine, config)
    before = {name: p.detach().clone() for name, p in trainable(engine.policy).items()}
    for step in range(2):
        report = train_step(step, parts, updates=step)
        assert report.metrics["loss/objective"] > 0
        assert not report.refused
    assert any(not torch.equal(before[name], p) for name, p in trainable(engine.policy).items())
    check_export(engine, config, root / f"{family}_{rank}")
    if rank == 0:
        check_resume(engine, config, parts, root)
    return run


def check_zero_signal(engine: OneProcessEngine, config: Config) -> None:
    """A teacher that is the student and sees no more has nothing to teach, also while the student trains."""
    alike = [replace(pair, teacher_ids=pair.student_ids) for pair in prompts(3, VOCABULARY)]
    parts = replace(parts_of(engine, config), train_prompts=stream_of(alike, seed=config.run.seed))
    rollouts = sample(parts, 0)
    weigh = RolloutWeights(config.tokens, False, ())
    for batch in pair([[(rollout, weigh(rollout))] for rollout in rollouts]):
        loss = engine.student_loss(batch, engine.score(batch.teacher), Objective.of(config))
        assert float(loss.value_N.abs().max()) < 1e-5
        gradients = torch.autograd.grad(loss.weighted_sum, list(trainable(engine.policy).values()), allow_unused=True)
        assert max(float(gradient.abs().max()) for gradient in gradients if gradient is not None) < 1e-3


def check_export(engine: OneProcessEngine, config: Config, folder: Path) -> None:
    """What transformers loads from the exported folder is what was trained."""
    tokenizer = AutoTokenizer.from_pretrained(engine.source.path)
    exporter = Exporter(engine.source, tokenizer, export_dtype="auto", own_template=False)
    assert exporter.export(engine, folder) == ""
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert furthest(exported, engine) < EXACT
    assert (folder / "adapter").is_dir() == (config.lora.rank > 0)


def furthest(causal: nn.Module, engine: OneProcessEngine) -> float:
    rows = agreement.probe_rows(causal)
    with engine.generating() as lm, torch.no_grad():
        return float(
            agreement.deviation(agreement.model_logits(causal, rows), agreement.model_logits(lm, rows)).median()
        )


def check_resume(engine: OneProcessEngine, config: Config, parts, root: Path) -> None:
    """A process that starts from a checkpoint takes the step that this one takes."""
    engine.save(root)
    train_step(2, parts, updates=2)
    again = OneProcessEngine(config, engine.source, torch.device("cpu"))
    others = parts_of(again, config)
    again.load(root)
    train_step(2, others, updates=2)
    for name, parameter in trainable(again.policy).items():
        assert torch.equal(parameter, trainable(engine.policy)[name]), name
