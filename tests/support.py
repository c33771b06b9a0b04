"""What several tests share: running ranks as real processes, and small settings objects."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
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


def run_ranks(arguments: Sequence[str | Path], world_size: int, *, seconds: float = 240) -> list[str]:
    """Run `python ARGUMENTS` on so many ranks; returns what each printed. Fails with the output of one that failed."""
    port = free_port()
    command = [sys.executable, *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            env=rank_environment(rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


def opsd(*arguments: str | Path, cwd: Path, seconds: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "opsd_cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def plain_objective(divergence, *, temperature: float, chunk_bytes: int):
    """A divergence over the whole vocabulary, for every token, and nothing else."""
    from opsd_cli.loss.chunked_head import Objective
    from opsd_cli.settings.config import TokenSettings

    every = TokenSettings(gate="none", gate_min=0.0, skip_first=0, ramp=0.0, skip_special=False, keep="all")
    return Objective(divergence, every, None, temperature, chunk_bytes, wide_logits=False)


def completer_of(lm, *, end_ids: Sequence[int] = (1,), warn=lambda message: None):
    """What draws completions from a model as it is."""
    from opsd_cli.engine.loading import LoadedModel
    from opsd_cli.engine.process_group import alone
    from opsd_cli.sampling.choose_decoder import Completer

    return Completer(LoadedModel(lm, None), alone(), end_ids=end_ids, pad_id=0, warn=warn)
