"""The process that carries out checks, one after another, and writes each outcome as a line of JSON the moment it is
known. An exception in a check ends this process (on a card it may have made every later answer wrong or impossible);
the runner then starts another one with the check that follows."""

from __future__ import annotations

import gc
import importlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpu_checks.check import Bench, Check, Row, judged
from opsd_cli.engine.device import forbid_reduced_precision

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "triton", "opsd-cli")


def planned(groups: Mapping[str, str], bench: Bench, only: Sequence[str]) -> list[tuple[str, Check]]:
    """The checks of these groups (name and module) whose full name begins with one of `only`, in order."""
    made = [(group, check) for group, file in groups.items() for check in importlib.import_module(file).checks(bench)]
    return [(group, check) for group, check in made if any(f"{group}/{check.name}".startswith(name) for name in only)]


def carry_out(groups: Mapping[str, str], *, device: str, only: Sequence[str], file: Path, done: int) -> None:
    """Run the checks after the first `done`; append lines `plan`, `begin` and `end` to `file`."""
    forbid_reduced_precision()  # as a rank does before it computes anything
    with tempfile.TemporaryDirectory(prefix="opsd-gpu-check-") as scratch, file.open("a") as lines:
        bench = Bench(torch.device(device, 0) if device == "cuda" else torch.device("cpu"), Path(scratch))
        plan = planned(groups, bench, only)
        say(lines, {"plan": [[group, check.name] for group, check in plan], "machine": machine(bench.device)})
        for place, (group, check) in enumerate(plan[done:], start=done):
            say(lines, {"begin": place})
            say(lines, {"end": place, "row": outcome(group, check, bench).plain()})
            if bench.device.type == "cuda":  # engines stand in circles of references, and others need the memory
                gc.collect()
                torch.cuda.empty_cache()


def say(lines: Any, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=lines, flush=True)


def outcome(group: str, check: Check, bench: Bench) -> Row:
    """The row of one check."""
    if why := check.lacks or (check.card_only if bench.is_small else ""):
        return Row(group, check.name, "skip", 0.0, note=why)
    start = time.perf_counter()
    found = check.run()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()  # a fault of a kernel shows here, not in the check that follows
    return judged(group, check, found, round(time.perf_counter() - start, 3))


def machine(device: torch.device) -> dict[str, str]:
    """What decides a figure: the card or processor, and the versions. No names of hosts."""
    facts = {"device": "cpu", "python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        facts |= {
            "device": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "memory": f"{free / 2**30:.1f} of {whole / 2**30:.1f} GiB free",
            "driver": driver(),
        }
    return facts | {package: version_of(package) for package in PACKAGES}


def driver() -> str:
    """The version of the NVIDIA driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.split()
    return said[0] if said else "unknown"


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main(words: Sequence[str]) -> None:
    """`python -m gpu_checks.child JSON`: what `gpu_check.py` says to a child."""
    asked = json.loads(words[0])
    carry_out(asked["groups"], device=asked["device"], only=asked["only"], file=Path(asked["file"]), done=asked["done"])


if __name__ == "__main__":
    main(sys.argv[1:])
