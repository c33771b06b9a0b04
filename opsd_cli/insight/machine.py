"""What the machine at hand offers a run: versions, devices, number formats, compilers, memory, disk, hub and clocks."""

from __future__ import annotations

import http.client
import os
import platform
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from opsd_cli.data.hub import offline
from opsd_cli.engine.device import card_of, choose_dtype
from opsd_cli.insight.findings import Findings
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import OpsdError

SHOWN = ("torch", "transformers", "deepspeed", "peft", "datasets")
OPTIONAL = ("triton", "vllm", "flash-attn", "bitsandbytes")
LITTLE_DISK = 2 * 2**30
SKEW_SECONDS = 5.0  # between the clocks of this machine and of the disk
HUB_SECONDS = 3.0
OWN_FILES = Path(__file__).parents[1]
FOLDER = re.compile(r"[./~]|bundled:")


def look_at_machine(findings: Findings, config: Config | None, *, problem: str, device: torch.device) -> None:
    """Note what is found. `problem` says why no GPU can be used, where one is expected; `device` is what a run uses."""
    _versions(findings)
    _devices(findings, config, problem=problem, device=device)
    _compilers(findings, config, device)
    _memory(findings)
    places = {"run.root": Path("runs" if config is None else config.run.root), "TMPDIR": Path(tempfile.gettempdir())}
    for name, place in places.items():
        _disk(findings, name, place)
    _hub(findings, config)
    _clocks(findings, places["run.root"])


def _versions(findings: Findings) -> None:
    held = {name: _version(name) for name in SHOWN}
    others = {name: found for name in OPTIONAL if (found := _version(name))}
    listed = ", ".join(f"{name} {found or 'missing'}" for name, found in (held | others).items())
    findings.add(
        "machine", "versions", "ok", f"opsd {_version('opsd-cli') or '?'}, Python {platform.python_version()}, {listed}"
    )
    for wanted in _requirements():
        found = _version(wanted.name)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            findings.add(
                "machine", "versions", "warning",
                f"{wanted.name} {found or 'is missing'}: opsd is made for {wanted.specifier}",
                f"pip install '{wanted}'",
            )  # fmt: skip


def _requirements() -> Iterator[Requirement]:
    """What opsd needs of packages, without its extras."""
    try:
        lines = requires("opsd-cli") or []
    except PackageNotFoundError:  # run from a checkout
        return
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield wanted


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices(findings: Findings, config: Config | None, *, problem: str, device: torch.device) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = "auto" if config is None else config.model.dtype
    if device.type == "cpu":
        cards = [card_of(device)]
        what = f"CPU, {cores} cores"
        if problem:
            findings.add("machine", "device", "warning", f"no GPU can be used: {problem}", "launcher.device=cpu")
    else:
        cards = [card_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
        sizes = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(len(cards))]
        what = ", ".join(f"{card}, {size:.0f} GiB" for card, size in zip(cards, sizes, strict=True))
    try:
        dtype, why = choose_dtype(asked, cards)
    except OpsdError as error:
        findings.add("machine", "dtype", "error", str(error))
        return
    name = str(dtype).removeprefix("torch.") + (f" ({why})" if why else "")
    findings.add("machine", "device", "ok", f"{what}; weights in {name}")


def _compilers(findings: Findings, config: Config | None, device: torch.device) -> None:
    found = [name for name in ("cc", "c++", "ninja", "nvcc") if shutil.which(name)]
    on_gpu = device.type == "cuda"
    offloads = config is not None and "cpu" in (config.zero.offload_optimizer, config.zero.offload_parameters)
    listed = f"compilers: {', '.join(found) or 'none'}"
    if on_gpu and "cc" not in found:
        change = "install gcc (apt install build-essential)"
        findings.add("machine", "compilers", "warning", f"{listed}: Triton's kernels need a C compiler", change)
    elif offloads and not {"c++", "ninja"} <= set(found):
        change = "install g++ and ninja, or use zero=stage2"
        findings.add("machine", "compilers", "error", f"{listed}: DeepSpeed builds its CPU optimizer here", change)
    else:
        used = "" if on_gpu or offloads else "; this run needs none"
        findings.add("machine", "compilers", "ok", listed + used)


def _memory(findings: Findings) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = _available_gib()
    said = "" if free is None else f", {free:.1f} GiB of it available"
    message = f"{total:.0f} GiB of host memory{said}"
    if free is not None and free < 1:
        findings.add("machine", "memory", "warning", message, "end other programs first")
    else:
        findings.add("machine", "memory", "ok", message)


def _available_gib() -> float | None:
    """Linux's own estimate."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(match[1]) / 2**20 if match else None


def existing(place: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def _disk(findings: Findings, name: str, place: Path) -> None:
    folder = existing(place)
    free = shutil.disk_usage(folder).free
    message = f"{name}={place}: {free / 2**30:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        findings.add("machine", "disk", "error", f"{name}={place}: {folder} cannot be written", f"{name}=FOLDER")
    elif free < LITTLE_DISK:
        findings.add("machine", "disk", "warning", message, f"free some space, or {name}=FOLDER")
    else:
        findings.add("machine", "disk", "ok", message)


def _hub(findings: Findings, config: Config | None) -> None:
    """Whether the hub answers, where the recipe names anything on it."""
    wanted = [] if config is None else _from_hub(config)
    if offline():
        needed = f"; {', '.join(wanted)} must be in the cache" if wanted else "; nothing here needs it"
        findings.add("machine", "hub", "ok", f"hub: HF_HUB_OFFLINE is set{needed}")
        return
    if config is not None and not wanted:
        findings.add("machine", "hub", "ok", "hub: not asked, nothing of this recipe comes from it")
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError, http.client.HTTPException) as error:
        change = "work offline with recipe=quickstart or model=hf model.path=FOLDER dataset.path=FOLDER"
        message = f"hub: {endpoint} does not answer ({type(error).__name__})"
        findings.add("machine", "hub", "warning", message, change)
        return
    findings.add("machine", "hub", "ok", f"hub: {endpoint} answers")


def _from_hub(config: Config) -> list[str]:
    """The hub ids that a run would look up."""
    teacher = vars(config.teacher).get("path")
    names = [config.model.path, *([teacher] if teacher else [])]
    found = [name for name in names if not (FOLDER.match(name) or name.count("/") > 1 or Path(name).exists())]
    data = vars(config.dataset).get("path", "")
    if config.dataset.plugin_name == "hub":
        found.append(str(data))
    elif config.dataset.plugin_name == "gsm8k" and data is None:
        found.append("openai/gsm8k")
    return found


def _clocks(findings: Findings, root: Path) -> None:
    """This machine's clock against the disk's, and against what is known to be past."""
    newest = max(file.stat().st_mtime for file in OWN_FILES.glob("*.py"))
    now = time.time()
    if now < newest:
        behind = time.strftime("%Y-%m-%d", time.gmtime(newest))
        message = f"the clock says {time.strftime('%Y-%m-%d')}, and opsd itself was written here on {behind}"
        findings.add("machine", "clock", "warning", message, "set the clock: dates in prompts and of runs are wrong")
        return
    try:
        with tempfile.NamedTemporaryFile(dir=existing(root), prefix=".opsd-clock-") as file:
            skew = os.stat(file.name).st_mtime - time.time()
    except OSError:
        return  # told with the disk
    if abs(skew) > SKEW_SECONDS:
        message = f"the clocks of this machine and of the disk of {root} differ by {skew:+.0f} s"
        change = "synchronise them (NTP), or the files of a run get dates of two clocks"
        findings.add("machine", "clock", "warning", message, change)
    else:
        findings.add(
            "machine", "clock", "ok", f"the clock says {time.strftime('%Y-%m-%d %H:%M')}, and so does the disk"
        )
