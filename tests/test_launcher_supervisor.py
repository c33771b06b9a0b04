"""The supervisor with real processes: exit codes, signals, saves that take long, and no orphan whatever
happens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opsd_cli.launch.supervisor import Ended, Limits, RankProcess, supervise
from opsd_cli.settings.errors import OutsideError

pytestmark = pytest.mark.slow

QUICK = Limits(settle_seconds=0.3, repeat_seconds=0.1, poll_seconds=0.02)

SAVES = """
import os, signal, sys, time
def save(number, frame):
    print("saving", flush=True)
    end = time.monotonic() + float(os.environ.get("SAVE_SECONDS", "0"))
    while time.monotonic() < end:
        time.sleep(0.01)
    print("saved", flush=True)
    os._exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""

DRIVER = """
import json, sys, pathlib
from opsd_cli.launch.supervisor import Limits, RankProcess, supervise
class Screen:
    def poll(self): pass
    def note(self, text): print("note:", text, flush=True)
    def close(self, **how): pass
spec = json.loads(sys.argv[1])
ranks = []
for rank, (code, environ) in enumerate(spec["ranks"]):
    at = pathlib.Path(spec["folder"])
    argv = (sys.executable, "-c", code)
    ranks.append(RankProcess(rank, argv, environ, at, at / f"rank_{rank}.log", f"rank_{rank}.error"))
ended = supervise(ranks, Screen(), limits=Limits(**spec["limits"]))
print("ended", ended.how, ended.code, flush=True)
raise SystemExit(ended.code)
"""


class Screen:
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def poll(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self, *, code, message, tail) -> None:
        pass


def ranks_of(folder: Path, *codes: str) -> list[RankProcess]:
    return [
        RankProcess(
            rank,
            (sys.executable, "-S", "-c", code),
            os.environ,
            folder,
            folder / f"rank_{rank}.log",
            f"rank_{rank}.error",
        )
        for rank, code in enumerate(codes)
    ]


def run(folder: Path, *codes: str, limits: Limits = QUICK) -> Ended:
    return supervise(ranks_of(folder, *codes), Screen(), limits=limits)


@pytest.fixture
def driven(tmp_path):
    """Start a supervisor process over ranks that run the given code; everything is gone at the end of the
    test.
    """
    started = []

    def start(*codes: str, environ: dict[str, str] | None = None, **limits: float) -> subprocess.Popen:
        spec = {
            "ranks": [[code, {**os.environ, "OPSD_TEST": str(tmp_path), **(environ or {})}] for code in codes],
            "limits": {"settle_seconds": 0.3, "repeat_seconds": 0.1, "poll_seconds": 0.02, **limits},
            "folder": str(tmp_path),
        }
        command = [sys.executable, "-c", DRIVER, json.dumps(spec)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    assert wait_until(lambda: not processes_of(tmp_path)), processes_of(tmp_path)


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def processes_of(folder: Path) -> list[int]:
    """Live processes that carry the test's folder in their environment."""
    mark, found = f"OPSD_TEST={folder}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = mark in (entry / "environ").read_bytes()
            is_dead = b") Z " in (entry / "stat").read_bytes()
        except OSError:
            continue
        if is_ours and not is_dead:
            found.append(int(entry.name))
    return found


def ready(folder: Path, ranks: int, word: str = "ready") -> bool:
    logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
    return wait_until(lambda: all(log.exists() and word in log.read_text() for log in logs))


def test_all_ranks_at_zero_is_a_completed_run(tmp_path):
    assert run(tmp_path, "print('a')", "print('b')") == Ended("completed", 0)
    assert (tmp_path / "rank_1.log").read_text().splitlines()[1:] == ["b"]


def test_the_code_of_the_rank_that_fails_is_returned_and_the_others_end(tmp_path):
    began = time.monotonic()
    assert run(tmp_path, "import time; time.sleep(60)", "raise SystemExit(7)") == Ended("failed", 7, 1, 7)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", 3), ("SIGTERM", 3), ("SIGSEGV", 1)])
def test_a_rank_killed_from_outside_is_the_environment_and_a_native_crash_a_bug(tmp_path, name, code):
    number = getattr(signal, name)
    dies = f"import os; os.kill(os.getpid(), {int(number)})"
    assert run(tmp_path, dies, "import time; time.sleep(60)") == Ended("failed", code, 0, -number)


def test_the_rank_whose_error_came_first_is_named_though_another_ended_first(tmp_path):
    cause = "open('rank_1.error', 'w').write('boom'); import time; time.sleep(.2); raise SystemExit(1)"
    consequence = "import time; time.sleep(.1); raise SystemExit(4)"
    ended = run(tmp_path, consequence, cause, limits=Limits(settle_seconds=1.0, poll_seconds=0.02))
    assert (ended.rank, ended.code) == (1, 1)


def test_a_rank_that_was_killed_is_the_cause_and_the_lost_connection_the_consequence(tmp_path):
    loses = "open('rank_0.error', 'w').write('connection closed'); raise SystemExit(1)"
    killed = "import os, time; time.sleep(.1); os.kill(os.getpid(), 9)"
    assert run(tmp_path, loses, killed).rank == 1


def test_a_rank_that_we_had_to_kill_is_not_taken_for_one_that_was_killed(tmp_path):
    loses = "open('rank_0.error', 'w').write('connection reset'); import time; time.sleep(60)"
    killed = "import os, time; time.sleep(.3); os.kill(os.getpid(), 9)"
    ended = run(tmp_path, loses, killed, limits=Limits(settle_seconds=1.0, poll_seconds=0.02))
    assert (ended.rank, ended.code) == (1, 3)


def test_a_rank_that_left_an_error_and_hangs_on_its_way_out_is_ended(tmp_path):
    hangs = "open('rank_0.error', 'w').write('boom'); import time; time.sleep(60)"
    ended = run(tmp_path, hangs, "import time; time.sleep(60)")
    assert (ended.how, ended.rank, ended.code) == ("failed", 0, 1)


def test_a_program_that_does_not_exist_is_an_outside_error_and_starts_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_TEST", str(tmp_path))
    ranks = ranks_of(tmp_path, "import time; time.sleep(60)", "pass")
    nowhere = RankProcess(1, ("/nonexistent",), os.environ, tmp_path, tmp_path / "l", "e")
    with pytest.raises(OutsideError, match="cannot start rank 1"):
        supervise([ranks[0], nowhere], Screen())
    assert [pid for pid in processes_of(tmp_path) if pid != os.getpid()] == []


def test_children_that_a_rank_leaves_behind_are_ended(driven, tmp_path):
    leaves = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert driven(leaves).wait(10) == 0
    assert wait_until(lambda: not processes_of(tmp_path), 3)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 143)])
def test_a_signal_reaches_every_rank_and_its_code_is_returned(driven, tmp_path, name, code):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    parent = driven(SAVES, SAVES)
    signal.signal(signal.SIGHUP, before)
    assert ready(tmp_path, 2)
    parent.send_signal(getattr(signal, name))
    assert parent.wait(10) == code
    assert ready(tmp_path, 2, "saved")


def test_a_signal_before_the_ranks_have_a_handler_still_stops_them(driven, tmp_path):
    parent = driven("print('ready', flush=True); import time; time.sleep(60)")
    assert ready(tmp_path, 1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(10) == 143


def test_a_long_save_is_waited_for_and_repeated_sigterms_do_not_cut_it_short(driven, tmp_path):
    parent = driven(SAVES, SAVES, environ={"SAVE_SECONDS": "3"})
    assert ready(tmp_path, 2)
    parent.send_signal(signal.SIGTERM)
    assert ready(tmp_path, 2, "saving")
    time.sleep(0.15)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(10) == 143
    assert ready(tmp_path, 2, "saved")


def test_a_second_ctrl_c_abandons_the_save_and_says_so(driven, tmp_path):
    parent = driven(SAVES, SAVES, environ={"SAVE_SECONDS": "60"})
    assert ready(tmp_path, 2)
    parent.send_signal(signal.SIGINT)
    assert ready(tmp_path, 2, "saving")
    time.sleep(0.15)
    parent.send_signal(signal.SIGINT)
    said = parent.communicate(timeout=10)[0]
    assert parent.returncode == 130
    assert "press Ctrl-C again to abandon the save" in said
    assert "the save is abandoned" in said
    assert "saved" not in (tmp_path / "rank_0.log").read_text()


def test_one_ctrl_c_delivered_twice_is_one(driven, tmp_path):
    parent = driven(SAVES, environ={"SAVE_SECONDS": "0.3"}, repeat_seconds=5.0)
    assert ready(tmp_path, 1)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(10) == 130
    assert ready(tmp_path, 1, "saved")


def test_ranks_that_never_stop_are_killed_when_their_time_is_up(driven, tmp_path):
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    parent = driven(deaf, deaf, save_seconds=0.3)
    assert ready(tmp_path, 2)
    parent.send_signal(signal.SIGTERM)
    assert "ended overdue 3" in parent.communicate(timeout=10)[0]


def test_a_rank_that_fails_while_the_others_save_ends_them(driven, tmp_path):
    fails = SAVES.replace("os._exit(128 + number)", "os._exit(1)")
    parent = driven(SAVES, fails, environ={"SAVE_SECONDS": "0.1"})
    assert ready(tmp_path, 2)
    parent.send_signal(signal.SIGTERM)
    assert "ended failed 1" in parent.communicate(timeout=10)[0]


def test_killing_the_supervisor_leaves_no_rank(driven, tmp_path):
    parent = driven(SAVES, SAVES)
    assert ready(tmp_path, 2)
    assert len(processes_of(tmp_path)) == 2
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not processes_of(tmp_path), 3)


def test_nohup_keeps_its_meaning(driven, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        parent = driven(SAVES)
        assert ready(tmp_path, 1)
        parent.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert parent.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_of_before_are_back_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    run(tmp_path, "pass")
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
