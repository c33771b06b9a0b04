"""Run by test_methods: every tree of a plan takes one real step on the bundled model. Trees in one list share an
engine, so that their steps follow each other. Leaves what each step reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import opsd_cli.plugins  # noqa: F401
from opsd_cli.engine.device import card_of
from opsd_cli.engine.process_group import connect, disconnect
from opsd_cli.rank.build import build_completer, build_parts, build_policy
from opsd_cli.rank.build_zero import build_engine
from opsd_cli.rank.run_data import load_run_data
from opsd_cli.settings.typed_config import typed_config
from opsd_cli.training.loop import train_step

DEVICE = torch.device("cpu")


def main(plan: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    ranks = connect(DEVICE)
    found, engines, completers, read = {}, {}, {}, {}
    for name, trees in plan.items():
        config = typed_config(trees[0])
        # What an engine and what prompts are made of; methods that share them take their steps one after another.
        made_of = json.dumps([trees[0][section] for section in ("model", "lora", "zero", "optim", "train")])
        for number, tree in enumerate(trees):
            shown = json.dumps([tree[section] for section in ("dataset", "context", "prompts", "target", "sampling")])
            if shown not in read:
                read[shown] = load_run_data(typed_config(tree), [card_of(DEVICE)], lambda _: None, train=True)
            run_data = read[shown]
            if made_of not in engines:
                policy, view, _ = build_policy(config, run_data.source, DEVICE, ranks)
                engines[made_of] = build_engine(config, policy, view, ranks, run_data.source, DEVICE)
                completers[made_of] = build_completer(
                    engines[made_of], ranks, run_data, policy.causal, lambda _: None
                )  # one of an engine: the first thing that it draws is a trial of its decoder
            engine = engines[made_of]
            parts = build_parts(
                typed_config(tree), engine, completers[made_of], run_data, lambda: False, enter=lambda _: None
            )
            found[f"{name} {number}"] = train_step(number, parts, updates=number).metrics
    for run_data in read.values():
        run_data.close()
    disconnect()
    return found


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.with_suffix(".found").write_text(json.dumps(main(json.loads(file.read_text()))))
