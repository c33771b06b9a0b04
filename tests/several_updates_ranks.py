"""Run by test_several_updates on one or two ranks: first steps of small runs on the bundled model, with one update and
with two on the same rollouts. Leaves the weights after each, the moving teacher's, and what the step has to show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import opsd_cli.plugins  # noqa: F401
from opsd_cli.engine.device import card_of
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.rank.build import build_completer, build_parts, build_policy
from opsd_cli.rank.build_zero import build_engine
from opsd_cli.rank.recorder import sample_lines
from opsd_cli.rank.run_data import load_run_data
from opsd_cli.settings.typed_config import typed_config
from opsd_cli.training.loop import train_step

DEVICE = torch.device("cpu")


def keep_weights(engine: ZeroEngine, file: Path) -> None:
    weights = dict(engine.whole_parameters())
    if engine.ranks.rank == 0:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, file)


def one_step(name: str, tree: dict, ranks: Ranks, folder: Path) -> None:
    config = typed_config(tree)
    run_data = load_run_data(config, [card_of(DEVICE)], lambda _: None, train=True)
    policy, view, _ = build_policy(config, run_data.source, DEVICE, ranks)
    engine = build_engine(config, policy, view, ranks, run_data.source, DEVICE)
    completer = build_completer(engine, ranks, run_data, policy.causal, lambda _: None)
    keep_weights(engine, folder / "start.safetensors")
    parts = build_parts(config, engine, completer, run_data, lambda: False, enter=lambda _: None)
    report = train_step(0, parts, updates=0)
    keep_weights(engine, folder / f"{name}.safetensors")
    copy = folder / f"{name}_teacher"
    copy.mkdir(exist_ok=True)
    parts.teacher.save(copy, rank=ranks.rank)
    found = {
        "updates": report.updates,
        "metrics": report.metrics,
        "samples": list(sample_lines(1, report.samples, run_data)),
    }
    (folder / f"{name}_{ranks.rank}.json").write_text(json.dumps(found))
    run_data.close()


def main(folder: Path) -> None:
    ranks = connect(DEVICE)
    for name, tree in json.loads((folder / "trees.json").read_text()).items():
        one_step(name, tree, ranks, folder)
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
