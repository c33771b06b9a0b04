"""A session that also measures what a look ahead needs: the weights' own log-probabilities, the divergence from the
teacher whatever is minimised, and completions of either prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from opsd_cli.api.session import Session
from opsd_cli.data.problems import PromptPair, Rollout
from opsd_cli.engine.loading import Source
from opsd_cli.engine.policy import Policy
from opsd_cli.insight.evaluation import Evaluation, Outcome, evaluate
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.sampling.samplers import own_decoder
from opsd_cli.settings.errors import ConfigError


class MeasuredSession(Session):
    """What `opsd doctor` and `opsd probe` look at. Raises as `Session`."""

    @property
    def policy(self) -> Policy:
        """The weights as hidden states and a head."""
        return self._policy

    @property
    def source(self) -> Source:
        """Where the model was loaded from, and how."""
        return self._data.source

    @property
    def dtype(self) -> torch.dtype:
        return self._data.source.dtype

    @property
    def has_teacher(self) -> bool:
        return self._parts.teacher is not None

    @property
    def shows_rollouts(self) -> bool:
        """Whether the teacher's prompts are made of a step's rollouts."""
        return self._data.renderer.needs_feedback

    def draw(
        self, prompts: Sequence[PromptPair], *, role: Literal["student", "teacher"], rollouts: int, seed: int
    ) -> list[Rollout]:
        """`rollouts` completions of a role's prompts by the current weights and `sampling.*`, whatever the config's
        sampler is; as `sample` otherwise."""
        sampler = own_decoder(self.config.eval, prompt=role, dataset_share=0.0)
        return sampler.sample(self._completer, self._request(prompts, rollouts, seed))

    def states(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[bool]:
        """Whether each completion (as text) states one of the answers beside it, by the config's grader."""
        return [grade.correct for grade in self._data.grader.grade(pairs)]

    def stated_share(self, rollouts: Sequence[Rollout]) -> float:
        """The share of completions that state an answer, right or wrong."""
        return sum(self._data.inspect(rollouts).stated) / len(rollouts)

    def teacher_kl(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Exact KL(teacher || student) in nats at each completion token of all rollouts, one after another, whatever
        the recipe minimises: of the teacher's whole distribution, before clip, support and token rules, without
        dropout. Raises ConfigError without a teacher."""
        if self._parts.teacher is None:
            raise ConfigError("there is no teacher to compare with: choose a method that has one")
        batch = self._batch(rollouts)
        rules = replace(self.config.tokens, gate="none", prefix_nats=0.0)
        objective = replace(
            self._parts.objective, divergence=ForwardKL(), tokens=rules, importance_cap=None, temperature=1.0
        )
        with torch.no_grad():
            return self.engine.compare(batch, self._target(batch), objective).value_N.tolist()

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The log-probability (nats, at loss.temperature) of each completion token of all rollouts, one after another,
        as the trainer sees it: what a sampler's own `logprobs` should be."""
        batch = self._batch(rollouts)
        with torch.no_grad():
            measured = self.engine.compare(batch, self._target(batch), self._parts.objective)
        return measured.diagnostics["logprob/student"].tolist()

    def outcomes(
        self, prompts: Sequence[PromptPair], *, role: Literal["student", "teacher"]
    ) -> tuple[Evaluation, list[Outcome]]:
        """`evaluate` of some prompts, and what became of each, in order. `prompts` is not empty."""
        evaluation, outcomes, _ = evaluate(
            self._completer,
            prompts,
            role=role,
            split=self.config.eval.split,
            settings=self.config.eval,
            seed=self.config.run.seed,
            inspect=self._data.inspect,
            should_stop=lambda: False,
            progress=lambda done: None,
        )
        return evaluation, outcomes
