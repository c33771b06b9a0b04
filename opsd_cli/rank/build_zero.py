"""The engine of a run: DeepSpeed's. Apart from `build`, so that a notebook gets everything else without DeepSpeed."""

from __future__ import annotations

import torch

from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import Ranks
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.settings.config import Config


def build_engine(
    config: Config, policy: Policy, view: GenerationView, ranks: Ranks, source: Source, device: torch.device
) -> ZeroEngine:
    return ZeroEngine(
        policy, view, ranks,
        zero=config.zero, optim=config.optim, steps=config.train.steps, device=device, source=source,
    )  # fmt: skip
