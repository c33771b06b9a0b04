"""Our side of `step.py --gpu`, in a process of its own: `python step_on_card.py WORKLOAD`. Loop, engine, decoder and
loss of `opsd train` on a model that is made on the card: no gigabytes of random weights go over a disk first. The last
line printed is what was measured, as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys

import torch
from on_card import parts_of

from opsd_cli.data.problems import PromptPair
from opsd_cli.engine.device import card_of, forbid_reduced_precision
from opsd_cli.rank.run_data import load_run_data
from opsd_cli.training.clock import peak_bytes
from opsd_cli.training.loop import train_step

METRICS = {"step": "time/step", "sample": "time/sample", "score": "time/score", "update": "time/update"}


def prompts(count: int, device: torch.device) -> list[PromptPair]:
    """The first of `recipe=quickstart`, rendered for the bundled tokenizer: what the peers are given as text."""
    from gpu_checks import twin

    config = twin.config_of((f"dataset.train_problems={count}",))
    run_data = load_run_data(config, [card_of(device)], lambda phase: None, train=True)
    run_data.close()
    return run_data.train_prompts.rendered[:count]


def main() -> None:
    work = json.loads(sys.argv[1])
    forbid_reduced_precision()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    words = (
        f"sampling.max_completion_tokens={work['completion']}", f"eval.max_completion_tokens={work['completion']}",
        f"train.micro_batch_tokens={work['micro_batch_tokens']}",
    )  # fmt: skip
    parts, _ = parts_of(work["shape"], device, prompts(work["problems"], device), adapter="lora", words=words)
    reports = []
    for number in range(work["steps"]):
        reports.append(train_step(number, parts, updates=number).metrics)
        print(f"# ours, step {number + 1}: {reports[-1]['time/step']:.3f} s", file=sys.stderr, flush=True)
    kept = reports[work["skip"] :]
    found = {name: statistics.median(report[metric] for report in kept) for name, metric in METRICS.items()}
    found["completion"] = statistics.median(report["rollout/length_mean"] for report in kept)
    print(json.dumps(found | {"peak_gib": peak_bytes(device) / 2**30}))


if __name__ == "__main__":
    main()
