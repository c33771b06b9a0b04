"""Run by test_run_data on two ranks: which prompts each has, how many of them it rendered itself, and how it ends where
a row of one rank's share cannot be rendered or a stop was asked for on one rank."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from huggingface_hub import constants

import opsd_cli.plugins  # noqa: F401
from opsd_cli.data.chat import ChatFormat
from opsd_cli.engine.device import Card
from opsd_cli.engine.process_group import connect, disconnect
from opsd_cli.rank.run_data import load_run_data
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.typed_config import typed_config
from opsd_cli.training.interruptions import StopRequested


def main(file: str) -> None:
    # The process was forked from one that had read these.
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE), False
    ranks = connect(torch.device("cpu"))
    rendered: list[int] = []
    render = ChatFormat._render

    def counted(self, conversations, **how):
        rendered.append(len(conversations))
        return render(self, conversations, **how)

    def stop(phase: str, done: int, total: int) -> None:
        if ranks.any(case == "stopped" and ranks.rank == 1):
            raise StopRequested

    ChatFormat._render = counted
    results = {}
    for case, tree in json.loads(Path(file).read_text()).items():
        rendered.clear()
        try:
            data = load_run_data(typed_config(tree), [Card("cpu")], print, train=True, tell_done=stop, ranks=ranks)
        except (DataError, StopRequested) as error:
            results[case] = {"error": str(error) or "stopped"}
            continue
        data.close()
        pairs = [(pair.student_ids, pair.teacher_ids) for pair in data.train_prompts.rendered]
        digest = hashlib.sha256(repr(pairs).encode()).hexdigest()
        results[case] = {"prompts": digest, "rendered": sum(count for count in rendered if count > 1)}
    Path(file).with_name(f"result_{os.environ['RANK']}.json").write_text(json.dumps(results))
    disconnect()


if __name__ == "__main__":
    main(sys.argv[1])
