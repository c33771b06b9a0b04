"""One child process after another that carries out some groups: started again behind a check that ended it, stopped
when a group hangs. Apart from the runner, which only asks it for new rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_checks import Group
from gpu_checks.check import Row, row_of
from opsd_cli.launch.devices import ask, gpu_hint
from opsd_cli.launch.rank_environ import quiet_environ

SCRIPTS = Path(__file__).parents[1]
START_SECONDS = 120  # until a child has imported everything and said what it will do
GRACE_SECONDS = 5
CORES = 2  # of a group that shares a machine with a card


def has_card(environ: Mapping[str, str]) -> bool:
    """Whether torch can compute on a card here; it is asked only where something hints at one."""
    return gpu_hint(environ) is not None and ask(environ).devices > 0


class Lane:
    """Groups that are carried out one after another, as rows."""

    def __init__(self, groups: Sequence[Group], device: str, only: Sequence[str], scratch: Path) -> None:
        self.groups, self.device = {group.name: group for group in groups}, device
        self.only = [name for name in only if name.partition("/")[0] in self.groups] or list(self.groups)
        self.file = scratch / f"{groups[0].name}.jsonl"
        self.log = self.file.with_suffix(".log")
        self.machine: dict[str, str] = {}
        self.is_alone = any(group.alone for group in groups)
        self.is_over = False
        self._plan: list[tuple[str, str]] | None = None
        self._done = 0  # checks that have a row
        self._begun: float | None = None  # when the check in progress began
        self._since: dict[str, float] = {}  # when each group began
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """A child for the checks that have no row yet."""
        self.file.write_bytes(b"")
        self._offset, self._begun, self._started, self._is_ready = 0, None, time.monotonic(), False
        asked = {
            "groups": {name: group.file for name, group in self.groups.items()},
            "device": self.device,
            "only": self.only,
            "file": str(self.file),
            "done": self._done,
        }
        environment = quiet_environ(os.environ, device="cuda" if self.device == "cuda" else "cpu")
        paths = [str(SCRIPTS), environment.get("PYTHONPATH", "")]
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        environment.setdefault("OMP_NUM_THREADS", "1" if self.device == "cpu" else str(CORES))
        if self.device == "cuda":  # one card: a run would take all it sees
            environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "gpu_checks.child", json.dumps(asked)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True,  # so that what it starts can be ended with it
            )  # fmt: skip

    def poll(self) -> Iterator[Row]:
        """Rows that have become known; starts the next child where one has ended early."""
        assert self._child is not None
        ended = self._child.poll() is not None  # asked first: what it wrote before its end is read below
        yield from self._read()
        if ended:
            yield from self._after_the_end()
        elif (late := self._too_late()) is not None:
            self.kill()
            yield from self._read()
            yield from self._hung(late)

    def kill(self) -> None:
        """End the child and everything it has started."""
        if self._child is None or self._child.poll() is not None:
            return
        os.killpg(self._child.pid, signal.SIGTERM)
        try:
            self._child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._kill_what_is_left(self._child.pid)
            self._child.wait()

    def names(self) -> list[str]:
        """Full names of the checks, from a child that carries out none of them."""
        self._done = sys.maxsize
        self.start()
        assert self._child is not None
        self._child.wait()
        list(self._read())
        if self._plan is None:
            raise SystemExit(self.log.read_text(errors="replace"))
        return [f"{group}/{name}" for group, name in self._plan]

    @staticmethod
    def _kill_what_is_left(group_id: int) -> None:
        try:
            os.killpg(group_id, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _read(self) -> Iterator[Row]:
        """Rows of whole lines that were not read yet."""
        with self.file.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines.read().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                if (row := self._take(json.loads(line))) is not None:
                    yield row

    def _take(self, said: dict[str, Any]) -> Row | None:
        if "plan" in said:
            self._plan, self._is_ready = [(group, name) for group, name in said["plan"]], True
            self.machine = said["machine"]
            for group in self._since:  # the start of another process is not the group's time
                self._since[group] += time.monotonic() - self._started
        elif "begin" in said:
            assert self._plan is not None
            self._begun = time.monotonic()
            self._since.setdefault(self._plan[said["begin"]][0], self._begun)
        else:
            self._done, self._begun = said["end"] + 1, None
            return row_of(said["row"])
        return None

    def _after_the_end(self) -> Iterator[Row]:
        """The child is gone: all is done, or the check in progress has ended it."""
        assert self._child is not None
        self._kill_what_is_left(self._child.pid)
        if self._plan is None or not self._is_ready:
            self.is_over = True
            yield from (Row(name, "start", "fail", 0.0, note=self._last_words()) for name in self.groups)
        elif self._begun is not None or self._done < len(self._plan):
            yield self._failed(self._last_words())
            self._go_on()
        else:
            self.is_over = True

    def _go_on(self) -> None:
        assert self._plan is not None
        if self._done < len(self._plan):
            self.start()
        else:
            self.is_over = True

    def _failed(self, note: str) -> Row:
        """The row of the check in progress, which has none of its own."""
        assert self._plan is not None
        group, name = self._plan[self._done]
        seconds = time.monotonic() - (self._begun or time.monotonic())
        self._done += 1
        return Row(group, name, "fail", round(seconds, 1), note=note)

    def _too_late(self) -> str | None:
        """The group that has taken longer than it may, or that never started."""
        now = time.monotonic()
        if not self._is_ready:
            first = next(iter(self.groups)) if self._plan is None else self._plan[self._done][0]
            return first if now - self._started > START_SECONDS else None
        if self._begun is None:
            return None
        group = self._plan[self._done][0]
        return group if now - self._since[group] > self.groups[group].seconds else None

    def _hung(self, late: str) -> Iterator[Row]:
        """The check in progress has failed, and those of its group behind it were not reached."""
        if self._plan is None or not self._is_ready:
            self.is_over = True
            yield Row(late, "start", "fail", START_SECONDS, note=f"no sign of life in {START_SECONDS} s")
            return
        seconds = self.groups[late].seconds
        yield self._failed(f"still at work when the {seconds} s of its group were over")
        while self._done < len(self._plan) and self._plan[self._done][0] == late:
            yield self._failed(f"not reached: the {seconds} s of its group were over")
        self._go_on()

    def _last_words(self) -> str:
        """How the child ended: its signal, and the last line it printed."""
        assert self._child is not None
        code = self._child.returncode
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line.split(" ")[0]]
        last = (errors or lines or [""])[-1].strip()[:300]
        return f"{how}: {last}"
