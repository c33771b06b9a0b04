"""What `plan.py` runs in place of `opsd train`: the same run, whose ranks also write what their heap held at most in
each phase of the steps, and which rows that was for. `python plan_worker.py train WORDS`, with heap_peak.so preloaded
and OPSD_PEAKS naming the files (one for each rank, its number at the end).

Bytes are those of blocks of 4 KiB and more beyond what the process held before it loaded the model: tensors and
workspaces, exactly, whichever thread frees them. Resident memory above the same base is written beside it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Heap:
    """What `heap_peak.c` counts, beyond a base."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.heap_now.restype = self._library.heap_peak.restype = ctypes.c_longlong
        self._base = 0
        self.phases: dict[str, int] = {}

    def begin(self) -> None:
        gc.collect()
        self._library.malloc_trim(0)
        self._base = self._library.heap_now()
        self._library.heap_reset()

    def end_phase(self, name: str) -> None:
        """The highest point since the last phase ended was in this one."""
        self.phases[name] = max(self.phases.get(name, 0), self._library.heap_peak() - self._base)
        self._library.heap_reset()


def measure_rank(arguments: list[str]) -> int:
    import opsd_cli.rank.run as run
    import opsd_cli.training.loop as loop
    from opsd_cli.rank.entry import main as rank
    from opsd_cli.training.clock import PhaseClock

    heap, found = Heap(), dict[str, Any](batches=[], drawn=[])
    build, fit, phase, plan, sample = (
        run.build_policy, run.fit, PhaseClock.phase, loop.micro_batches, loop.sample,
    )  # fmt: skip

    @contextmanager
    def measured_phase(clock: PhaseClock, name: str) -> Iterator[None]:
        heap.end_phase("other")
        try:
            with phase(clock, name):
                yield
        finally:
            heap.end_phase(name)

    def measured_build(*given: Any, **more: Any) -> Any:
        heap.begin()
        found["base"] = resident("VmRSS")
        return build(*given, **more)

    def measured_fit(*given: Any, **more: Any) -> None:
        heap.end_phase("load")
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory starts again from here
        try:
            fit(*given, **more)
        finally:
            heap.end_phase("other")
            found.update(phases=heap.phases, resident=resident("VmHWM"))
            Path(f"{os.environ['OPSD_PEAKS']}.{os.environ['RANK']}").write_text(json.dumps(found))

    def seen_batches(*given: Any, **more: Any) -> Any:
        made = plan(*given, **more)
        sizes = [(sum(b.student.lengths), sum(b.teacher.lengths), len(b.target_ids_N)) for b in made]
        found["batches"].append(sizes)
        return made

    def seen_sample(*given: Any, **more: Any) -> Any:
        made = sample(*given, **more)
        found["drawn"].append([len(rollout.prompt.student_ids) for rollout in made])
        return made

    run.build_policy, run.fit, PhaseClock.phase = measured_build, measured_fit, measured_phase
    loop.micro_batches, loop.sample = seen_batches, seen_sample
    return rank(arguments)


def main() -> int:
    if sys.argv[1] != "train":
        return measure_rank(sys.argv[1:])
    import opsd_cli.launch.launchers
    from opsd_cli.cli import main as command_line

    opsd_cli.launch.launchers.WORKER = ("-P", str(Path(__file__).resolve()))
    return command_line(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
