"""opsd from Python, in one process and without DeepSpeed.

What a notebook needs. The names of this package are stable; everything else may move. docs/api.md shows each at work.

    from opsd_cli import api

    with api.Session(api.compose("recipe=quickstart", "train.steps=20")) as session:
        for event in session.train():
            print(event)
"""

from opsd_cli.api.saved_run import Run, load_run
from opsd_cli.api.session import Session, compose, token_loss
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.data.token_rules import Completion
from opsd_cli.insight.evaluation import Evaluation
from opsd_cli.insight.samples import RolloutView, TokenView
from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.by_value import check_closed_form
from opsd_cli.loss.types import Head, TokenLoss, TokenScores
from opsd_cli.settings.config import Config

__all__ = [
    "AlignedTokens",
    "Completion",
    "Config",
    "Evaluation",
    "Head",
    "Problem",
    "PromptPair",
    "Rollout",
    "RolloutView",
    "Run",
    "Session",
    "TokenLoss",
    "TokenScores",
    "TokenView",
    "check_closed_form",
    "compose",
    "load_run",
    "token_loss",
]
