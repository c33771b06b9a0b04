"""The command that hands a run folder to DeepSpeed's own multi-node runner, as a list of words; DeepSpeed itself is not
imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from opsd_cli.launch.devices import Device
from opsd_cli.settings.errors import ConfigError

Runner = Literal["pdsh", "openmpi", "mpich", "impi", "slurm"]

NODE_SCRIPT = Path(__file__).with_name("remote_rank.py")

_FORWARDED = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that DeepSpeed's runners do not pass to other machines. Tokens are never put on a command line."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Host name -> ranks, from lines like `worker-1 slots=4`. Raises ConfigError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launcher.hostfile {path} cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if text and (not match or match[1] in hosts):
            problem = "is a duplicate host" if match else "is not `HOST slots=N`"
            raise ConfigError(f"{path}:{number}: {text!r} {problem}")
        if match:
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"launcher.hostfile {path} names no host; write one `HOST slots=N` per line")
    return hosts


def deepspeed_command(
    run: Path,
    task: str,
    *,
    hosts: Mapping[str, int],
    hostfile: Path,
    runner: Runner,
    runner_args: str,
    master_port: int,
    device: Device,
    threads: int | None,
    environ: Mapping[str, str],
) -> tuple[str, ...]:
    """The words of the command. The ranks meet at the first host of the host file."""
    master = next(iter(hosts))
    options = [
        f"--hostfile={hostfile}",
        f"--launcher={runner}",
        f"--launcher_args={runner_args}",
        f"--master_addr={master}",
        f"--master_port={master_port}",
        "--no_local_rank",
        *(["--no_ssh_check"] if runner != "pdsh" else []),
    ]
    forwarded = [f"{name}={environ[name]}" for name in _FORWARDED if name in environ]
    node = [str(run), task, device, str(threads or 0), master, str(master_port), *forwarded]
    return (sys.executable, "-m", "deepspeed.launcher.runner", *options, str(NODE_SCRIPT), *node)
