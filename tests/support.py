"""What several tests share: running ranks as real processes, and small settings objects."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TESTS = Path(__file__).parent
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher sets for one rank on this machine."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(TESTS)]),
    }


class WarmProcess:
    """A process that a fork server started, as subprocess.Popen shows one."""

    def __init__(self, server: Path, arguments: Sequence[str | Path], environ: dict[str, str], output: Path) -> None:
        self._output, self._code = output, None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(str(server))
        request = {"arguments": [*map(str, arguments)], "environ": environ, "folder": os.getcwd()}
        self._connection.sendall(json.dumps(request | {"output": str(output)}).encode())
        self.pid = self._answer(timeout=30)

    def _answer(self, timeout: float) -> int:
        """The next number that the server sends. Raises TimeoutError."""
        self._connection.settimeout(timeout)
        return int(self._connection.recv(64))

    def wait(self, timeout: float) -> int:
        """Its exit code, negative for a signal. Raises TimeoutError."""
        if self._code is None:
            self._code = self._answer(timeout)
            self._connection.close()
        return self._code

    def poll(self) -> int | None:
        """Its exit code if it has ended."""
        try:
            return self.wait(timeout=0.001)
        except TimeoutError:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> str:
        return self._output.read_text(errors="replace")


@cache
def scratch_folder() -> Path:
    """For the sockets of the fork servers and what their processes print; gone when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="opsd-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


may_start_ranks = True  # set by conftest for each test: whether it is marked slow


@cache
def _fork_server(number: int) -> Path:
    address = scratch_folder() / f"server_{number}"
    server = subprocess.Popen(
        [sys.executable, TESTS / "fork_server.py", address],
        env=rank_environment(0, 1, 0),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # closes its input, which ends it
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return address


def fork_server(number: int) -> Path:
    """The socket of a fork server of this process of the tests."""
    assert may_start_ranks, "this test starts ranks: mark it with @pytest.mark.slow"
    return _fork_server(number)


LAUNCHES = count()


def start_ranks(arguments: Sequence[str | Path], world_size: int, **environ: str) -> list[WarmProcess]:
    """Start `python ARGUMENTS` on so many ranks. Of two servers, each with a hash seed of its own, every launch takes
    them in the other order: neither two ranks nor two attempts at a run have an order of sets in common by chance."""
    port, launch = free_port(), next(LAUNCHES)
    return [
        WarmProcess(
            fork_server((launch + rank) % 2),
            arguments,
            rank_environment(rank, world_size, port) | environ,
            scratch_folder() / f"output_{launch}_{rank}",
        )
        for rank in range(world_size)
    ]


def run_ranks(arguments: Sequence[str | Path], world_size: int, *, seconds: float = 240, **environ: str) -> list[str]:
    """Run `python ARGUMENTS` on so many ranks; returns what each printed. Fails with the output of one that failed."""
    processes = start_ranks(arguments, world_size, **environ)
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    for code, process in zip(codes, processes, strict=True):
        assert code == 0, process.output()[-4000:]
    return [process.output() for process in processes]


def opsd(
    *arguments: str | Path, cwd: Path, seconds: float = 240, cold: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Run the command as a user does, in a process of its own. Where it matters how ranks start, `cold` ones do so as
    a user's, and not from a fork server."""
    assert may_start_ranks, "this test starts a command: mark it with @pytest.mark.slow"
    command = ["-m", "opsd_cli"] if cold else [TESTS / "warm_command.py", fork_server(0), fork_server(1)]
    return subprocess.run(
        [sys.executable, *map(str, (*command, *arguments))],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(TESTS)]), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def token_rules(**changes):
    """Every token alike, but for `changes`."""
    from opsd_cli.settings.config import TokenSettings

    rules = {
        "skip_first": 0, "first": 0, "prefix_nats": 0.0, "prefix_of": "all", "ramp": 0.0, "skip_special": False,
        "keep": "all", "pass_powers": (0.0, 0.0), "gate": "none", "gate_min": 0.0, "gate_width": 0.0, "gate_low": 0.0,
        "gate_high": 1.0,
    }  # fmt: skip
    return TokenSettings(**rules | changes)


def plain_objective(divergence, *, temperature: float, chunk_bytes: int):
    """A divergence over the whole vocabulary, for every token, and nothing else."""
    from opsd_cli.loss.chunked_head import Objective

    return Objective(divergence, token_rules(), None, temperature, chunk_bytes, wide_logits=False)


def completer_of(lm, *, end_ids: Sequence[int] = (1,), warn=lambda message: None):
    """What draws completions from a model as it is."""
    from opsd_cli.engine.loading import LoadedModel
    from opsd_cli.engine.process_group import alone
    from opsd_cli.sampling.choose_decoder import Completer

    return Completer(LoadedModel(lm, None), alone(), end_ids=end_ids, pad_id=0, warn=warn)
