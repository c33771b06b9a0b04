"""A model, its data and its teacher in this process: composed, looked at, sampled, scored, trained and evaluated.

Shape letters: N completion tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

import opsd_cli.plugins  # noqa: F401 - fills the registries
from opsd_cli.data.microbatches import cut_to_budget
from opsd_cli.data.pairing import PairedBatch, Weighed, filler_batch, pair, row_length
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.engine.device import card_of, forbid_reduced_precision
from opsd_cli.engine.export import Exporter
from opsd_cli.engine.plain import PlainEngine
from opsd_cli.engine.process_group import alone
from opsd_cli.engine.saved_weights import Which, find_checkpoint, put_into, read_weights, step_of
from opsd_cli.insight.evaluation import Evaluation, evaluate
from opsd_cli.insight.samples import RolloutView
from opsd_cli.insight.token_view import look
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.loss.types import Head, TokenLoss, TokenMixture, TokenScores
from opsd_cli.preflight import check
from opsd_cli.rank.build import build_completer, build_parts, build_policy
from opsd_cli.rank.recorder import quiet_libraries, token_pieces
from opsd_cli.rank.run_data import load_run_data
from opsd_cli.run.folder import open_run_folder, read_config
from opsd_cli.sampling.samplers import SampleRequest, StaticSampler, checked_rollouts
from opsd_cli.sampling.vllm import VllmSampler
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.plugin_files import use_plugins
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.teachers.teachers import score_target
from opsd_cli.training.loop import due, train_step, weigh

Event = dict[str, Any]
"""One line of `events.jsonl`: `kind`, and what docs/outputs.md lists for that kind."""


def compose(*words: str, plugins: Sequence[str | Path] = (), recipes: str | Path | None = None) -> Config:
    """The checked config of the words of a command line, `compose("recipe=quickstart", "divergence=jsd")`. `plugins`
    are files as after --plugin, `recipes` a folder as after --recipes; ./recipes is searched too. Loads no weights.

    Raises ConfigError with every problem, PluginError where a plug-in file fails.
    """
    use_plugins(plugins)
    _, members = check(words, find_folders(None if recipes is None else str(recipes)))
    return members[0].config


def token_loss(
    config: Config,
    student_ND: Tensor,
    head: Head,
    *,
    teacher: TokenScores | TokenMixture | None,
    target_ids_N: Tensor,
    weights_N: Tensor | None = None,
) -> TokenLoss:
    """The loss of a config as a function of two models' hidden states, exact over the whole vocabulary and in bounded
    memory.

    `student_ND` are hidden states at the N positions that predict the completion tokens `target_ids_N`, `head` is the
    student's output head (logits = hidden @ weight_VD.T); `teacher` holds the teacher's hidden states at the same N
    positions and its head, None where that is the student's. `weights_N` (1 each where it is None) scale the tokens.

    Returns a TokenLoss: `weighted_sum`, a number with gradient to `student_ND` and to the head where it is trainable;
    `value_N`, the divergence of each token in nats; `diagnostics`, by metric name. Divide `weighted_sum` by the sum of
    the weights for a mean.
    """
    weights_N = torch.ones(len(target_ids_N), device=student_ND.device) if weights_N is None else weights_N
    batch = replace(
        filler_batch(0),
        target_ids_N=target_ids_N,
        weights_N=weights_N,
        weight=float(weights_N.sum()),
        sampler_logprobs_N=torch.full_like(weights_N, torch.nan),
    )
    return Objective.of(config, student_ND.device)(student_ND, head, batch=batch, target=teacher)


class Session:
    """A model, its data and its teacher, alive in this process: to look at prompts, sample, score, train and evaluate.
    Use it as a context manager, or call `close`. It writes nothing unless `save_model` is called.

    Raises what `opsd train` would say in one line: ConfigError, DataError or OutsideError.
    """

    def __init__(self, config: Config, *, device: str | torch.device = "cpu") -> None:
        # In one process: whatever draws beside the ranks of a run, or in several of them together, draws here.
        if isinstance(config.sampler, StaticSampler | VllmSampler):
            config = replace(config, sampler=replace(config.sampler, placement="shared", processes=1, lag=0))
        if isinstance(config.sampler, VllmSampler):
            config = replace(config, sampler=replace(config.sampler, tensor_parallel=1))
        self.config, self.device = config, torch.device(device)
        self.step = 0  # steps done
        self._updates = 0
        forbid_reduced_precision()
        quiet_libraries()
        ranks = alone()
        self._data = data = load_run_data(config, [card_of(self.device)], lambda phase: None, train=True)
        self._policy, view, _ = build_policy(config, data.source, self.device, ranks)
        self.engine = PlainEngine(
            self._policy, view, ranks,
            optim=config.optim, steps=config.train.steps, device=self.device, source=data.source,
        )  # fmt: skip
        self.warnings: list[str] = [*data.warnings.values()]
        self._completer = build_completer(self.engine, ranks, data, self._policy.causal, self.warnings.append)
        self._parts = build_parts(config, self.engine, self._completer, data, lambda: False, enter=lambda phase: None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that render templates and grade answers."""
        self._data.close()

    def load_checkpoint(self, run: str | Path, step: Which = "last") -> int:
        """Give the model, and a teacher that moves, the weights that they had at a checkpoint of a run: of a step, the
        newest ("last") or the best by held-out accuracy ("best"). Returns its step. The run may be stopped or going on;
        the session's model and adapter must be the run's. The optimizer's state is not read.

        Raises ConfigError where there is no such checkpoint, DataError for one that is damaged or of another model.
        """
        folder = open_run_folder(run)
        checkpoint = find_checkpoint(folder.checkpoints, step)
        put_into(self._policy.lm, read_weights(checkpoint), source=checkpoint)
        if (
            self._parts.teacher is not None
            and read_config(folder)["teacher"]["name"] == self.config.teacher.plugin_name
        ):
            self._parts.teacher.load(checkpoint, rank=0)
        return step_of(checkpoint)

    # Data and prompts -------------------------------------------------------------------------------------------------

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The training problems, in the order of the data."""
        return self._data.splits.train

    @property
    def held_out(self) -> list[PromptPair]:
        """The problems that `evaluate` measures (`eval.problems` of `eval.split`), rendered."""
        return self._data.eval_prompts

    @property
    def tokenizer(self) -> Any:
        return self._data.tokenizer

    @property
    def model(self) -> Any:
        """The transformers model (or peft's around it) that is trained."""
        return self._policy.lm

    def render(self, problems: Sequence[Problem]) -> list[PromptPair]:
        """Each problem as token ids under both roles' prompts, `student_ids` and `teacher_ids`. Problems over
        prompts.max_tokens are left out; DataError where more than prompts.max_dropped_share are."""
        return self._data.renderer.render(problems, seed=self.config.run.seed)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, control tokens included."""
        return str(self.tokenizer.decode(list(ids)))

    # Sampling and scoring ---------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[PromptPair], *, rollouts: int = 1, seed: int | None = None) -> list[Rollout]:
        """`rollouts` completions of each prompt from the current weights, by the config's sampler and its
        `sampling.*`: grouped by prompt, `completion_ids` and the sampler's `logprobs` (nats). The same seed draws the
        same tokens."""
        request = self._request(prompts, rollouts, self.config.run.seed if seed is None else seed)
        sampler = self.config.sampler
        return checked_rollouts(sampler.sample(self._completer, request), request, name=sampler.plugin_name)

    def grade(self, rollouts: Sequence[Rollout]) -> list[bool]:
        """Whether each completion states its problem's answer, by the config's grader."""
        return self._data.inspect(rollouts).correct

    def texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        """The completions as text, without control tokens."""
        return self._data.texts(rollouts)

    def loss(self, rollouts: Sequence[Rollout]) -> TokenLoss:
        """The config's objective on these rollouts, every token with weight 1 (`inspect` and `train` apply the token
        rules): `value_N` (nats) at the completion tokens of all rollouts, one after another, and `weighted_sum`, a
        number with gradient into the model, on which `backward()` may be called once."""
        batch = self._batch(rollouts)
        return self.engine.student_loss(batch, self._target(batch), self._parts.objective)

    def score(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """The divergence (nats) at each completion token of each rollout, without gradient."""
        with torch.no_grad():
            values = self.loss(rollouts).value_N.tolist()
        lengths = [len(rollout.completion_ids) for rollout in rollouts]
        ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
        return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def with_prompts(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same completions behind this session's prompts of the same problems, by id: to compare two teachers.
        Raises ConfigError for a problem whose prompts are over prompts.max_tokens here."""
        pairs = {pair.problem.id: pair for pair in self.render([one.prompt.problem for one in rollouts])}
        if missing := [one.prompt.problem.id for one in rollouts if one.prompt.problem.id not in pairs]:
            limit = self.config.prompts.max_tokens
            raise ConfigError(f"problem {missing[0]} has prompts longer than prompts.max_tokens={limit} here; raise it")
        return [replace(one, prompt=pairs[one.prompt.problem.id]) for one in rollouts]

    def inspect(self, rollouts: Sequence[Rollout]) -> list[RolloutView]:
        """Each rollout token by token: both roles' most likely tokens and entropies, the divergence, and what support,
        clip, gates and token rules leave of it. Needs a teacher; raises ConfigError without one."""
        if self._parts.teacher is None:
            raise ConfigError("there is no teacher to compare with: choose a method that has one")
        if empty := [rollout for rollout in rollouts if not rollout.completion_ids]:
            raise ConfigError(f"{len(empty)} of {len(rollouts)} rollouts have no completion to look at")
        seen = self._data.inspect(rollouts)
        # A context that is made of rollouts is filled in as in a step: their teacher's prompts show nothing before.
        rollouts, _ = self._parts.with_feedback(rollouts, seen.right)
        weighed = weigh(self._parts, rollouts, seen)
        lengths = [row_length(rollout) for rollout, _ in weighed]
        order = sorted(range(len(weighed)), key=lengths.__getitem__)
        budget, padded = self.config.train.micro_batch_tokens, self.engine.pads
        pieces = cut_to_budget([lengths[place] for place in order], ranks=1, max_tokens=budget, padded=padded)
        views: dict[int, RolloutView] = {}
        for start, stop in pieces:
            if mine := order[start:stop]:
                views |= zip(mine, self._look([weighed[place] for place in mine]), strict=True)
        return [views[place] for place in range(len(weighed))]

    def _look(self, weighed: Sequence[Weighed]) -> list[RolloutView]:
        batch = pair([weighed])[0].to(self.device)
        with torch.no_grad():
            target = self._target(batch)
            return look(
                [rollout for rollout, _ in weighed],
                batch,
                objective=self._parts.objective,
                plain=self.config.divergence,
                run=lambda objective: self.engine.compare(batch, target, objective),
                pieces=lambda ids: token_pieces(ids, self.tokenizer.decode),
                decode=self.decode,
            )

    def _request(self, prompts: Sequence[PromptPair], rollouts: int, seed: int) -> SampleRequest:
        return SampleRequest(
            prompts=list(enumerate(prompts)),
            rollouts_per_problem=rollouts,
            sampling=self.config.sampling,
            seed=seed,
            encode_completion=self._data.renderer.encode_completion,
            should_stop=lambda: False,
        )

    def _batch(self, rollouts: Sequence[Rollout]) -> PairedBatch:
        if empty := [rollout for rollout in rollouts if not rollout.completion_ids]:
            raise ConfigError(f"{len(empty)} of {len(rollouts)} rollouts have no completion to score")
        (batch,) = pair([[(rollout, [1.0] * len(rollout.completion_ids)) for rollout in rollouts]])
        return batch.to(self.device)

    def _target(self, batch: PairedBatch) -> TokenScores | TokenMixture | None:
        teacher = self._parts.teacher
        return None if teacher is None else score_target(teacher, batch, self.config.target)

    # Training and evaluation ------------------------------------------------------------------------------------------

    def train(self, steps: int | None = None) -> Iterator[Event]:
        """Take `steps` more steps (None: up to train.steps, or as train.seconds allow) and yield an event after each:
        `step` with its metrics, and `evaluation` where `eval.every` is due. The steps are those of `opsd train`: the
        same rollouts, loss and updates."""
        last = self.config.train.steps if steps is None else min(self.step + steps, self.config.train.steps)
        while self.step < last and not self._parts.time.is_used_up:
            report = train_step(self.step, self._parts, updates=self._updates)
            self._parts.time.add_step(report.metrics["time/step"], self.engine.ranks)
            self.step, self._updates = self.step + 1, self._updates + report.updates
            yield {"kind": "step", "step": self.step, "metrics": report.metrics}
            if self._data.eval_prompts and due(self.step, self.config.eval.every):
                yield {"kind": "evaluation", "step": self.step, **asdict(self.evaluate())}

    def evaluate(
        self, prompts: Sequence[PromptPair] | None = None, *, role: Literal["student", "teacher"] = "student"
    ) -> Evaluation:
        """Accuracy on the held-out problems (or `prompts`) under a role's prompt, with its 95 % interval (`low`,
        `high`) and completion lengths. Raises ConfigError where there is nothing to measure."""
        measured = self._data.eval_prompts if prompts is None else list(prompts)
        if not measured:
            raise ConfigError("there is nothing to evaluate: set eval.problems, or give prompts with answers")
        evaluation, _, _ = evaluate(
            self._completer,
            measured,
            role=role,
            split=self.config.eval.split,
            settings=self.config.eval,
            seed=self.config.run.seed,
            inspect=self._data.inspect_measured,
            should_stop=lambda: False,
            progress=lambda done: None,
        )
        return evaluation

    def save_model(self, folder: str | Path) -> Path:
        """Write the model as a Hugging Face folder, an adapter merged. Raises OutsideError if it cannot be written."""
        exporter = Exporter(
            self._data.source, self.tokenizer,
            export_dtype=self.config.model.export_dtype, own_template=self.config.model.chat_template is not None,
            end_ids=self._completer.end_ids,
        )  # fmt: skip
        exporter.export(self.engine, Path(folder))
        return Path(folder)
