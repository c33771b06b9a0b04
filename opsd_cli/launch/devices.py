"""Whether ranks run on GPUs or on the CPU, and on how many: torch decides, not the environment variables. It is asked
in a process of its own (`ask_torch`), and only if something hints at a GPU, so that a machine without one starts fast.
AMD and Intel accelerators are not looked for."""

from __future__ import annotations

import functools
import glob
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opsd_cli.safety.terminal import escape_controls
from opsd_cli.settings.errors import ConfigError, OutsideError

Device = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]

SCRIPT = Path(__file__).with_name("ask_torch.py")
ASK_SECONDS = 120.0  # torch may come from a slow network file system, and each GPU takes a moment to start
INSTALL_PAGE = "https://pytorch.org/get-started/locally"
LONGEST_PROBLEM = 300  # characters of torch's message that are shown


@dataclass(frozen=True)
class Answer:
    """What torch answered: GPUs it can compute on, or why there are none."""

    devices: int
    problem: str = ""
    torch: str | None = None
    cuda: str | None = None  # None in a build for CPUs


@dataclass(frozen=True)
class Choice:
    """How many ranks on which device, and what the user should know about it, each in one line."""

    ranks: int
    device: Device
    notes: tuple[str, ...] = ()


def choose_ranks(
    ranks: int | None,
    device: DeviceChoice,
    *,
    environ: Mapping[str, str],
    only: int | None = None,
    seconds: float = ASK_SECONDS,
    beside: int = 0,
) -> Choice:
    """How many ranks to start here and on what: one per GPU that torch can use, else one on the CPU, unless set
    otherwise. `only` is the one device that will be used, if torchrun or srun started the ranks; `beside` GPUs are left
    to other processes. Raises OutsideError if
    a GPU is asked for and torch can use none, ConfigError if there are fewer than ranks."""
    hint = gpu_hint(environ)
    if device == "cpu" or (device == "auto" and hint is None):
        return Choice(ranks or 1, "cpu")
    return decide(ranks, device, ask(environ, only=only, seconds=seconds), hint=hint, environ=environ, beside=beside)


def decide(
    ranks: int | None,
    device: DeviceChoice,
    answer: Answer,
    *,
    hint: str | None,
    environ: Mapping[str, str],
    beside: int = 0,
) -> Choice:
    """`choose_ranks` after torch has answered. `hint` is why torch was asked."""
    if answer.devices == 0:
        reason = why_no_gpu(answer, environ)
        if device == "cuda":
            raise OutsideError(
                f"launcher.device=cuda, but torch can use no GPU here: {reason}; launcher.device=cpu runs on the CPU"
            )
        note = f"running on the CPU although {hint}: {reason}; set launcher.device=cpu to silence this"
        return Choice(ranks or 1, "cpu", (note,))
    seen = f"{answer.devices} GPU{'s' if answer.devices > 1 else ''}{_as_chosen(environ)}"
    free = answer.devices - beside
    if beside and (ranks or 1) > free:
        raise ConfigError(
            f"sampler.placement=separate with sampler.processes={beside} and launcher.ranks={ranks or 1} needs "
            f"{beside + (ranks or 1)} GPUs, and torch sees {seen}; use sampler.placement=shared, or launcher.device=cpu"
        )
    if ranks is not None and ranks > answer.devices:
        raise ConfigError(
            f"launcher.ranks is {ranks} but torch sees {seen}; use launcher.ranks={answer.devices} or fewer, or "
            "launcher.device=cpu"
        )
    chosen = environ.get("CUDA_VISIBLE_DEVICES", "")
    named = sum(bool(item.strip()) for item in chosen.split(","))
    note = (
        f"CUDA_VISIBLE_DEVICES={chosen} names {named} devices and torch sees {answer.devices}: "
        "CUDA stops at the first that is missing or a duplicate, and uses one MIG device at most"
    )
    return Choice(ranks or free, "cuda", (note,) if named > answer.devices else ())


def gpu_hint(environ: Mapping[str, str]) -> str | None:
    """What suggests an NVIDIA GPU, in words; None if nothing does, or if the user has hidden them all. Only a reason to
    ask torch: each of these can be there without a GPU that works."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and (not chosen.strip() or chosen.strip().startswith("-")):
        return None
    if nodes := [path for path in sorted(glob.glob("/dev/nvidia*")) if re.fullmatch(r"/dev/nvidia\d+", path)]:
        return f"this machine has {nodes[0]}"
    for path in ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1"):
        if Path(path).exists():
            return f"this machine has an NVIDIA driver ({path})"
    if program := shutil.which("nvidia-smi", path=environ.get("PATH")):
        return f"this machine has {program}"
    return None if chosen is None else f"CUDA_VISIBLE_DEVICES is {chosen}"


def present_cards(environ: Mapping[str, str]) -> list[tuple[str, float]]:
    """Name and memory in GiB of the NVIDIA GPUs of this machine that the user has not hidden, as `nvidia-smi` tells
    them: torch is not asked, which takes seconds. Empty where there is no such program or it fails."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None or gpu_hint(environ) is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=20.0, check=True)
        rows = [line.rpartition(",") for line in done.stdout.splitlines() if line.strip()]
        found = [(escape_controls(name.strip()), float(mebibytes) / 1024) for name, _, mebibytes in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    numbers = [int(word) for word in chosen.split(",") if word.strip().isdigit() and int(word) < len(found)]
    return [found[number] for number in numbers] or found[:1]  # identifiers of another kind: one of those here


def ask(environ: Mapping[str, str], *, only: int | None = None, seconds: float = ASK_SECONDS) -> Answer:
    """What torch answers in a process with this environment; if that process hangs, crashes or prints something else,
    the answer is that it can use no GPU. Asked once per environment, however many runs a sweep has."""
    return _ask(tuple(sorted(environ.items())), only, seconds)


@functools.cache
def _ask(environ: tuple[tuple[str, str], ...], only: int | None, seconds: float) -> Answer:
    command = [sys.executable, "-P", "-W", "ignore", str(SCRIPT), *([] if only is None else [str(only)])]
    try:
        ended = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Answer(0, f"torch did not answer within {seconds:.0f} s")
    except OSError as error:
        return Answer(0, f"no process to ask torch could be started: {error.strerror}")
    try:
        return Answer(**json.loads(ended.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        last = (ended.stderr.strip() or "no output").splitlines()[-1]
        return Answer(0, f"the process that asked torch ended with exit code {ended.returncode} ({last})")


def why_no_gpu(answer: Answer, environ: Mapping[str, str]) -> str:
    """Why torch can use no GPU, in one line, and what to do about it if that is known."""
    if answer.torch is not None and answer.cuda is None:
        return f"torch {answer.torch} is a CPU build; to use a GPU install a CUDA build ({INSTALL_PAGE})"
    problem = " ".join(escape_controls(answer.problem).split())
    problem = problem if len(problem) <= LONGEST_PROBLEM else problem[:LONGEST_PROBLEM] + "..."
    build = f" (torch {answer.torch}, built for CUDA {answer.cuda})" if answer.torch else ""
    return f"{problem}{build}{_as_chosen(environ)}"


def _as_chosen(environ: Mapping[str, str]) -> str:
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    return "" if chosen is None else f" with CUDA_VISIBLE_DEVICES={chosen or repr('')}"
