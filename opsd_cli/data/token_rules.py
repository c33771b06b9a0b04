"""Token rules of the user's own: which completion tokens count, and how much, from the text alone. The built-in rules
are settings of the group `tokens` (`loss.token_weights`), and multiply. Importing it does not import torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opsd_cli.data.problems import FinishReason, Problem
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import TokenRule, plugin


@dataclass(frozen=True)
class Completion:
    """What a rule is given: one completion of N tokens."""

    problem: Problem
    ids: tuple[int, ...]  # token ids, N of them
    tokens: tuple[str, ...]  # each token by itself, as text, N of them
    text: str  # the whole completion, without control tokens
    correct: bool
    finish_reason: FinishReason


@plugin("token_rule", "none")
class NoRule:
    """Every token counts as it is."""

    def weights(self, completion: Completion) -> Sequence[float]:
        return [1.0] * len(completion.ids)


def checked_weights(rule: TokenRule, completion: Completion, *, name: str) -> list[float]:
    """A rule's factors, one a token. Raises ConfigError for another number of them, or one that is negative or not
    finite."""
    weights = [float(weight) for weight in rule.weights(completion)]
    if len(weights) != len(completion.ids):
        raise ConfigError(
            f"token_rule={name}: {len(weights)} weights for a completion of {len(completion.ids)} tokens; return one "
            "weight for each of completion.tokens"
        )
    if wrong := [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]:
        raise ConfigError(f"token_rule={name}: a weight is {wrong[0]}; it must be a finite number, 0 or more")
    return weights
