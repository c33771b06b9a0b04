"""Run by test_apart: a run of two ranks whose completions are drawn one step ahead in a process beside them, stopped
and killed within a step and continued, against the same run left alone. Prints a JSON line for each."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import yaml
from crash.runs import attempt, differences, make_run, preload

from opsd_cli.run.events import read_events
from opsd_cli.run.folder import RunFolder
from opsd_cli.sampling.sampling_child import MODULE

AHEAD = {"placement": "separate", "processes": 1, "lag": 1}
MARK = "OPSD_TEST_APART"


def run_at(folder: Path) -> RunFolder:
    run = make_run(folder, 4)
    tree = yaml.safe_load(run.config.read_text())
    tree["sampler"] |= AHEAD
    tree["loss"]["importance_cap"] = 2.0
    tree["checkpoint"]["every"], tree["eval"]["every"], tree["eval"]["problems"] = 2, 0, 0
    run.config.write_text(yaml.safe_dump(tree))
    return run


def of_steps(run: RunFolder, name: str) -> list[float]:
    return [event["metrics"][name] for event in read_events(run.events) if event["kind"] == "step"]


def left_processes() -> int:
    """Sampling processes of this script that still run; they are given a moment."""
    deadline = time.monotonic() + 20
    while (left := sum(map(is_ours, Path("/proc").glob("[0-9]*")))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def is_ours(process: Path) -> bool:
    try:
        is_one = MODULE.encode() in (process / "cmdline").read_bytes()
        return is_one and f"{MARK}={os.getpid()}".encode() in (process / "environ").read_bytes()
    except OSError:
        return False


def main(root: Path) -> None:
    os.environ[MARK] = str(os.getpid())
    preload()
    whole = run_at(root / "whole")
    codes, lags = attempt(whole, ranks=2), of_steps(whole, "sampler/lag")
    corrected = all(0.5 < factor < 2 for factor in of_steps(whole, "tokens/importance"))
    print(json.dumps({"case": "whole", "codes": codes, "lags": lags, "corrected": corrected}), flush=True)
    for case, fault in (("stopped", "term@step.scored:3"), ("killed", "kill@step.scored:4")):
        cut = run_at(root / case)
        codes = [*attempt(cut, fault, ranks=2), *attempt(cut, ranks=2)]
        found = differences(whole, cut, stopped=case == "stopped")
        print(json.dumps({"case": case, "codes": codes, "differences": found}), flush=True)
    print(json.dumps({"case": "left", "processes": left_processes()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
