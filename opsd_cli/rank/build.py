"""From a config to live objects, in the order in which a rank builds them. Nothing here runs a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_cli.data.answers import AnswerChecker
from opsd_cli.data.contexts import Context
from opsd_cli.data.problems import Problem, PromptPair, Rollout, Splits
from opsd_cli.data.prompts import PromptRenderer
from opsd_cli.data.seeds import derive_seed
from opsd_cli.engine.device import Card, choose_dtype
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source, add_adapter, find_source, load_model, load_tokenizer
from opsd_cli.engine.logits_check import check_logits
from opsd_cli.engine.packed import LayoutChoice, usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import Ranks
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.chunked_head import Objective, try_out
from opsd_cli.rank.drift_monitor import count_signs
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.samplers import Weights
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, DataError
from opsd_cli.training.interruptions import TokenBudget
from opsd_cli.training.loop import Parts
from opsd_cli.training.step_report import Inspection, PhaseClock

Tell = Callable[[str], None]


@dataclass(frozen=True)
class RunData:
    """Everything a run reads before it loads weights: data, tokenizer and prompts."""

    splits: Splits
    source: Source
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    train_prompts: list[PromptPair]
    eval_prompts: list[PromptPair]
    retention_prompts: list[PromptPair]
    notes: list[str]  # what became of the problems, in words
    checker: AnswerChecker

    def texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        """The completions as text, without control tokens."""
        ids = [list(rollout.completion_ids) for rollout in rollouts]
        # transformers decodes an empty batch to one empty text.
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []

    def inspect(self, rollouts: Sequence[Rollout]) -> Inspection:
        """Which completions state their problem's answer, and signs of a run that drifts."""
        texts = self.texts(rollouts)
        correct = self.checker.grade([(t, r.prompt.problem.answer) for t, r in zip(texts, rollouts, strict=True)])
        return Inspection(correct, count_signs(rollouts, texts, correct))

    def with_feedback(
        self, rollouts: Sequence[Rollout], correct: Sequence[bool]
    ) -> tuple[list[Rollout], dict[str, float]]:
        """Rebuild the teacher's prompts of a context that is made of rollouts; others stay as they are. Beside them
        counts by metric name, where there was anything to rebuild."""
        if not self.renderer.needs_feedback:
            return list(rollouts), {}
        return self.renderer.with_feedback(rollouts, correct, self.texts(rollouts))

    def close(self) -> None:
        """Reap the child processes."""
        self.renderer.close()
        self.checker.close()


def load_run_data(config: Config, cards: Sequence[Card], tell: Tell, *, train: bool) -> RunData:
    """Read data and tokenizer and render every prompt that will be needed. `cards` are the devices of all ranks."""
    if train:
        try_out(Objective.of(config).divergence, name=config.divergence.plugin_name, support=config.support)
    dtype, why = choose_dtype(config.model.dtype, cards)
    tell("reading the dataset")
    splits = config.dataset.load()
    tell("loading the tokenizer")
    source = find_source(config.model, dtype=dtype, tell=tell)
    tokenizer = load_tokenizer(source, chat_template=config.model.chat_template)
    renderer = PromptRenderer(
        tokenizer,
        settings=config.prompts,
        context=Context(config.context),
        instruction=config.dataset.instruction,
        other=config.target.other,
    )
    tell("rendering prompts")
    number_format = str(dtype).removeprefix("torch.") + (f" ({why})" if why else "")
    packed = "; frozen ones of its layers in 4 bits" if config.model.quantize == "4bit" else ""
    notes = [f"dataset: {splits.source}", f"weights: {config.model.path} in {number_format}{packed}"]
    held_out = held_out_problems(config, splits)
    sets = {
        "training": splits.train if train else (),
        config.eval.split: held_out,
        "retention": splits.retention if held_out else (),
    }
    prompts: dict[str, list[PromptPair]] = {name: [] for name in sets}
    for name, problems in sets.items():
        is_training = train and name == "training"  # only there is the target's other prompt needed
        if problems or is_training:
            prompts[name], report = renderer.render(problems, seed=config.run.seed, with_other=is_training)
            notes.append(f"{name}: {report}")
    return RunData(
        splits, source, tokenizer, renderer,
        prompts["training"], prompts[config.eval.split], prompts["retention"], notes, AnswerChecker(),
    )  # fmt: skip


def held_out_problems(config: Config, splits: Splits) -> tuple[Problem, ...]:
    """The first `eval.problems` of the chosen split."""
    problems: tuple[Problem, ...] = {"validation": splits.validation, "test": splits.test}[config.eval.split]
    if config.eval.problems and not problems:
        raise DataError(
            f"eval.split={config.eval.split} is empty in {splits.source}; set eval.problems=0 to train without "
            f"evaluation, or dataset.{config.eval.split}_problems to take some from the training problems"
        )
    return problems[: config.eval.problems]


def build_policy(
    config: Config, source: Source, device: torch.device, ranks: Ranks
) -> tuple[Policy, GenerationView, LayoutChoice]:
    """Weights, adapter and the view of them for generation; and how rows are run. Collective."""
    causal = load_model(source, device=device).causal  # in place before the view shares its buffers
    check_context_length(config, causal.config.to_dict())
    rows = usable_layout(causal, ranks)
    lm = add_adapter(causal, config.lora, seed=derive_seed(config.run.seed, "adapter"))
    policy = Policy(lm, layout=rows.layout)
    if config.train.gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_logits(policy, source.path)
    return policy, GenerationView(policy, source, config.lora), rows


def check_context_length(config: Config, model: dict[str, object]) -> None:
    """Prompt and completion together must fit the positions the model was made for."""
    positions = model.get("max_position_embeddings")
    limit = max(config.sampling.max_completion_tokens, config.eval.max_completion_tokens)
    if isinstance(positions, int) and config.prompts.max_tokens + limit > positions:
        raise ConfigError(
            f"prompts.max_tokens is {config.prompts.max_tokens} and completions may have {limit} tokens, but the "
            f"model has {positions} positions; lower sampling.max_completion_tokens, eval.max_completion_tokens or "
            "prompts.max_tokens"
        )


def build_engine(
    config: Config, policy: Policy, view: GenerationView, ranks: Ranks, source: Source, device: torch.device
) -> ZeroEngine:
    return ZeroEngine(
        policy, view, ranks,
        zero=config.zero, optim=config.optim, steps=config.train.steps, device=device, source=source,
    )  # fmt: skip


def build_completer(
    weights: Weights, ranks: Ranks, run_data: RunData, causal: PreTrainedModel, warn: Tell
) -> Completer:
    """What draws completions from `weights`, whose architecture is that of `causal`."""
    end_ids = run_data.renderer.end_ids(causal.generation_config)
    return Completer(weights, ranks, end_ids=end_ids, pad_id=run_data.tokenizer.pad_token_id, warn=warn)


def build_parts(
    config: Config,
    engine: ZeroEngine,
    completer: Completer,
    run_data: RunData,
    should_stop: Callable[[], bool],
    *,
    enter: Callable[[str], None],
) -> Parts:
    """Everything `training.loop` needs. The teacher is built last: a frozen copy is taken of the weights as loaded."""
    return Parts(
        config=config,
        engine=engine,
        teacher=config.teacher.build(engine),
        sampler=config.sampler,
        completer=completer,
        objective=Objective.of(config),
        train_prompts=run_data.train_prompts,
        special_ids=frozenset(run_data.tokenizer.all_special_ids) - set(completer.end_ids),
        encode_completion=run_data.renderer.chat.encode_completion,
        inspect=run_data.inspect,
        with_feedback=run_data.with_feedback,
        should_stop=should_stop,
        clock=PhaseClock(engine.device, enter),
        budget=TokenBudget(config.train.micro_batch_tokens),
    )
