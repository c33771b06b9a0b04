"""What every benchmark here shares: interleaved timing, peak memory, a table or a file of it, and a line that names the
machine. Owns no case: what is measured is in the other files."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from opsd_cli.cpu.allocator import keep_freed_memory
from opsd_cli.engine.device import forbid_reduced_precision

Run = Callable[[], object]
STATUS = Path("/proc/self/status")


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {"action": "store_true", "help": "the large sizes as well (minutes)"},
    "small": {"action": "store_true", "help": "with --gpu: its code at sizes for a test, also on a CPU"},
    "rounds": {"type": int, "help": "repetitions of every case, interleaved"},
    "cpu_seconds": {"action": "store_true", "help": "time CPU seconds, not wall seconds: for a machine in use"},
}
"""What only some benchmarks have: the others refuse it instead of ignoring it."""


def arguments(description: str, *, takes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that all benchmarks have, and those of OPTIONS that this one `takes`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on the first GPU, in bfloat16, at real shapes")
    parser.add_argument("--threads", type=int, help="CPU threads (default: OMP_NUM_THREADS, else all cores)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the table to FILE, and what it was measured on"
    )
    for name, how in OPTIONS.items():
        if name in takes:
            parser.add_argument(f"--{name.replace('_', '-')}", **how)
        else:
            parser.set_defaults(**{name: None})
    return parser


def start(options: argparse.Namespace) -> torch.device:
    """Apply the common options and say on what is measured, and of how many rounds a figure is the median where a
    benchmark takes that. All cases run with the allocator and the exactness of products of `opsd train`."""
    if options.small and not options.gpu:
        raise SystemExit("--small goes with --gpu: the sizes without it are those of a CPU")
    keep_freed_memory()
    forbid_reduced_precision()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.gpu and not (torch.cuda.is_available() or options.small):
        small = "" if options.small is None else "; --gpu --small runs the same code at small sizes on a CPU"
        raise SystemExit(f"--gpu: torch sees no card here{small}")
    device = device_of(options)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to look for itself
    clock = "CPU" if options.cpu_seconds else "wall"
    medians = f", medians of {options.rounds} round{'s' * (options.rounds > 1)}" if options.rounds else ""
    print(f"# {machine(device)}; {clock} seconds{medians}")
    return device


def device_of(options: argparse.Namespace) -> torch.device:
    """The first card with `--gpu`, where there is one."""
    return torch.device("cuda", 0) if options.gpu and torch.cuda.is_available() else torch.device("cpu")


def machine(device: torch.device) -> str:
    """The hardware and the versions that decide a figure; no names of hosts."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    facts = Path("/proc/cpuinfo")
    flags = facts.read_text() if facts.exists() else ""
    vendor = "AMD, " if "AuthenticAMD" in flags else "Intel, " if "GenuineIntel" in flags else ""
    wide = ", AVX-512" if "avx512f" in flags else ", AVX2" if "avx2" in flags else ""
    kind = platform.machine().replace("x86_64", "x86-64")
    cores = f"{os.cpu_count()} CPU cores ({vendor}{kind}{wide}), {torch.get_num_threads()} thread(s)"
    return f"{cores}, load {os.getloadavg()[0]:.1f}, {versions}"


def interleaved(cases: dict[str, Run], *, rounds: int, cpu_seconds: bool = False) -> dict[str, float]:
    """Median seconds of each case, all cases once a round, after one round that does not count."""
    clock = time.process_time if cpu_seconds else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    # What libraries hold is not looked through before every run: on a card that would take longer than the run.
    gc.collect()
    gc.freeze()
    for number in range(rounds + 1):
        for name, run in cases.items():
            settle()
            start_time = clock()
            run()
            synchronize()
            if number > 0:
                seconds[name].append(clock() - start_time)
    gc.unfreeze()
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_extra_mib(run: Run) -> float:
    """The most memory `run` used at once beyond what was in use before it, MiB; run it once before."""
    settle()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_mib("VmRSS")
    run()
    return resident_mib("VmHWM") - before


def peak_resident_gib(run: Run) -> float:
    """The most memory this process held while `run` ran, with what it held before, on a CPU."""
    settle()
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run()
    return resident_mib("VmHWM") / 1024


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak), MiB; where there is no /proc, the peak of the process."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) / 1024


def trim() -> None:
    """Give freed memory back to the system, so that it is counted again when it is used again."""
    libc = ctypes.CDLL(None)
    if platform.libc_ver()[0] == "glibc":
        libc.malloc_trim(0)


def settle() -> None:
    gc.collect()
    synchronize()


def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, so that it can be pasted into docs/performance.md."""
    cells = [[_cell(value) for value in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def report(options: argparse.Namespace, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The table, and with `--json` a file of it: the machine, the command's words, head and rows in full digits."""
    table(head, rows)
    if options.json is not None:
        words, lines = sys.argv[1:], [list(row) for row in rows]
        whole = {"machine": machine(device_of(options)), "words": words, "head": list(head), "rows": lines}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


def _cell(value: object) -> str:
    """Three digits at least: milliseconds and gibibytes of a card are small numbers."""
    if isinstance(value, float):
        size = abs(value)
        digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
        return f"{value:,.{digits}f}"
    return str(value)
