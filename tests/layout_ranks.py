"""Run by test_packed on two ranks: on rank 1 packed rows see each other and the fast decoder is wrong. Leaves what each
rank decided, what it drew and what it scored in one real step."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import opsd_cli.plugins  # noqa: F401
from opsd_cli.engine import packed
from opsd_cli.engine.device import card_of
from opsd_cli.engine.process_group import connect, disconnect
from opsd_cli.rank.build import build_completer, build_parts, build_policy
from opsd_cli.rank.build_zero import build_engine
from opsd_cli.rank.plan import training_plan
from opsd_cli.rank.run_data import load_run_data
from opsd_cli.sampling import choose_decoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.settings.typed_config import typed_config
from opsd_cli.training.loop import train_step

DEVICE = torch.device("cpu")


class WrongDecoder(LlamaDecoder):
    """Attention with another scale."""

    def __init__(self, lm) -> None:
        super().__init__(lm)
        self.scale *= 1.5


def plant_faults() -> None:
    right = packed.packed_attention

    def forgets_where_rows_end(module, query, key, value, mask, *, rows=None, **more):
        return right(module, query, key, value, mask, **more)

    packed.packed_attention, choose_decoder.LlamaDecoder = forgets_where_rows_end, WrongDecoder


def main(tree: dict) -> dict:
    ranks = connect(DEVICE)
    if ranks.rank == 1:
        plant_faults()
    config = typed_config(tree)
    run_data = load_run_data(config, [card_of(DEVICE)], lambda _: None, train=True)
    policy, view, rows = build_policy(config, run_data.source, DEVICE, ranks)
    engine = build_engine(config, policy, view, ranks, run_data.source, DEVICE)
    completer = build_completer(engine, ranks, run_data, policy.causal, lambda _: None)
    parts = build_parts(config, engine, completer, run_data, lambda: False, enter=lambda _: None)
    plan = training_plan(config, engine, completer, rows, evaluates=False)
    drawn = []

    def inspect(rollouts):
        drawn.extend(rollouts)
        return run_data.inspect(rollouts)

    scored = train_step(0, replace(parts, inspect=inspect), updates=0).token_losses
    with engine.generating() as lm:
        decoder = type(completer.loop(lm).decoder).__name__
    run_data.close()
    disconnect()
    return {
        "layout": policy.layout, "attention": policy.causal.config._attn_implementation, "decoder": decoder,
        "plan": plan, "drawn": [rollout.key for rollout in drawn], "scored": list(scored), "rank": ranks.rank,
    }  # fmt: skip


if __name__ == "__main__":
    file = Path(sys.argv[1])
    found = main(json.loads(file.read_text()))
    file.with_name(f"rank_{found['rank']}.json").write_text(json.dumps(found))
