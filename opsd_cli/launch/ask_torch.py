"""A script that prints, as one line of JSON, what torch can compute on here, or torch's own message if it can use no
GPU. It runs in a process of its own because the command that starts ranks never loads torch, and because a driver may
hang or crash whoever asks it; by path, so that it works wherever it is started."""

from __future__ import annotations

import json
import sys
from typing import Any


def answer(only: int | None) -> dict[str, Any]:
    """Versions, usable devices, and why there are none. Something is computed on each device that will be used (`only`
    that one, if it is given): a listed card can be full, broken, or too old for the kernels of this build."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch needs is missing
        return {"torch": None, "cuda": None, "devices": 0, "problem": f"torch cannot be imported: {error}"}
    versions: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip}
    device = ""
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
        for index in range(count) if only is None else range(count)[only : only + 1] or range(min(count, 1)):
            device = f"cuda:{index} ({torch.cuda.get_device_name(index)}): "
            torch.ones(2, device=f"cuda:{index}").sum().item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a CPU build
        return {**versions, "devices": 0, "problem": device + str(error)}
    return {**versions, "devices": count, "problem": "" if count else "No CUDA GPUs are available"}


if __name__ == "__main__":
    print(json.dumps(answer(int(sys.argv[1]) if sys.argv[1:] else None)))
