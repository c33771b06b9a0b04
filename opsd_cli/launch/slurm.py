"""The launcher for a SLURM cluster: which job is asked for, and the text of its batch script. Submitting and following
is `submit`; what the job does when it runs is `slurm_job`, which starts the ranks with srun."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from opsd_cli.launch.attempt import Prepared
from opsd_cli.launch.devices import DeviceChoice
from opsd_cli.launch.launchers import Count, EnvLauncher, Seconds
from opsd_cli.launch.rank_environ import PACKAGE_ROOT
from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.plugin_files import used_plugins
from opsd_cli.settings.registry import plugin

NonNegative = Annotated[int, Field(ge=0)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:@+-]*$")]
Features = Annotated[str, Field(pattern=r"^[A-Za-z0-9_(\[][A-Za-z0-9_.,:&|*()\[\]!+-]*$")]
Memory = Annotated[str, Field(pattern=r"^[1-9][0-9]*[KMGT]?$")]
TimeLimit = Annotated[str, Field(pattern=r"^([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}$")]
Option = Annotated[str, Field(pattern=r"""^--[a-z][a-z0-9-]*(=[^\s"'\\#]+)?$""")]
Line = Annotated[str, Field(pattern=r"^[^\x00\n\r]*$")]
Options = Annotated[tuple[Option, ...], Field(strict=False)]
Lines = Annotated[tuple[Line, ...], Field(strict=False)]

JOB = ("-P", "-m", "opsd_cli.launch.slurm_job")
"""What Python runs as the batch step."""
IN_JOB = "OPSD_SLURM_JOB"
"""Set by the batch step for its ranks: the job's number."""

_OURS = (
    *("array", "chdir", "job-name", "nodes", "ntasks", "ntasks-per-node", "no-requeue", "open-mode", "output"),
    *("error", "requeue", "signal", "wrap", "wait", "parsable"),
)
_SETTINGS = {
    **{"account": "account", "constraint": "constraint", "partition": "partition", "qos": "qos", "time": "time"},
    **{"mem": "memory_per_node", "cpus-per-task": "cpus_per_rank", "gpus-per-node": "gpus_per_node"},
}
"""Options of sbatch that have a setting of their own."""


@plugin("launcher", "slurm")
class SlurmLauncher:
    """A SLURM job. Typed on a login node, the command writes the batch script, submits it and follows the run; in the
    job every rank is `opsd train --resume RUN` under srun, and joins the others as with launcher=env."""

    nodes: Count
    ranks_per_node: Count
    gpus_per_node: NonNegative | None  # None: one for each rank, or none on the CPU
    cpus_per_rank: Count | None
    memory_per_node: Memory | None
    time: TimeLimit | None
    partition: Word | None
    account: Word | None
    qos: Word | None
    constraint: Features | None
    sbatch: Options
    setup: Lines
    signal_seconds: Annotated[int, Field(gt=0, le=65535)]
    restarts: NonNegative
    follow: bool
    device: DeviceChoice
    threads: Count | None
    save_seconds: Seconds
    stall_seconds: Seconds | None

    @property
    def ranks(self) -> int:
        """In all."""
        return self.nodes * self.ranks_per_node

    def prepare(self, environ: Mapping[str, str], *, beside: int = 0) -> Prepared:
        """Of a rank in its job. Raises ConfigError where srun has not started it."""
        env = EnvLauncher(
            device=self.device, threads=self.threads, save_seconds=self.save_seconds, stall_seconds=self.stall_seconds
        )
        return env.prepare(environ, beside=beside)

    @property
    def typed_only(self) -> dict[str, Sequence[str]]:
        """As `RunsWords` has it."""
        return {f"launcher.{key}": value for key, value in (("sbatch", self.sbatch), ("setup", self.setup)) if value}

    def options(self, name: str) -> list[str]:
        """The options of sbatch for the run `name`. Raises ConfigError for one in `sbatch` that is written here."""
        for option in self.sbatch:
            word = option.removeprefix("--").partition("=")[0]
            if word in _SETTINGS:
                raise ConfigError(f"launcher.sbatch has {option}; set launcher.{_SETTINGS[word]} instead")
            if word in _OURS:
                raise ConfigError(f"launcher.sbatch has {option}, which opsd sets itself; leave it out")
        gpus = self.gpus_per_node
        if gpus is None:
            gpus = 0 if self.device == "cpu" else self.ranks_per_node
        given: dict[str, object] = {
            "job-name": f"opsd-{name}",
            "nodes": self.nodes,
            "ntasks-per-node": self.ranks_per_node,
            "gpus-per-node": gpus or None,
            "cpus-per-task": self.cpus_per_rank,
            "mem": self.memory_per_node,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "signal": f"B:USR1@{self.signal_seconds}",
            "open-mode": "append",
        }
        words = [f"--{option}={value}" for option, value in given.items() if value is not None]
        return [*words, "--requeue" if self.restarts else "--no-requeue", *self.sbatch]

    def srun(self, folder: RunFolder, *, task: str, trusts: bool) -> list[str]:
        """The words that start the ranks in the job. The frozen config in the run folder is what they run."""
        shape = [f"--nodes={self.nodes}", f"--ntasks={self.ranks}", f"--ntasks-per-node={self.ranks_per_node}"]
        # Since SLURM 22.05 srun does not take it from the job.
        shape += [f"--cpus-per-task={self.cpus_per_rank}"] if self.cpus_per_rank else []
        rank = [sys.executable, "-P", "-m", "opsd_cli", task, "--resume", str(folder.path)]
        rank += [word for plugin in used_plugins() for word in ("--plugin", str(folder.plugins / plugin.copy_name))]
        rank += ["model.trust_remote_code=true"] if trusts else []
        # What a rank that fails leaves the others waiting for never comes; they get a minute at most.
        return ["srun", "--kill-on-bad-exit=1", "--input=none", "--unbuffered", *shape, *rank]

    def script(self, folder: RunFolder, *, task: str, trusts: bool) -> str:
        """The batch script. Raises ConfigError for an option that cannot be given."""
        root = [] if PACKAGE_ROOT.name in ("site-packages", "dist-packages") else [str(PACKAGE_ROOT)]
        words = [sys.executable, *JOB, str(folder.path), str(self.restarts)]
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {option}" for option in self.options(folder.name)),
                "",
                *(f"export PYTHONPATH={shlex.quote(path)}${{PYTHONPATH:+:$PYTHONPATH}}" for path in root),
                *self.setup,
                "# Passes a request to save on to the ranks, and queues the job again where the run is to go on.",
                f"exec {shlex.join(words)} \\",
                f"  {shlex.join(self.srun(folder, task=task, trusts=trusts))}",
                "",
            ]
        )


def is_in_job(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank of a job of this launcher."""
    return IN_JOB in environ and environ[IN_JOB] == environ.get("SLURM_JOB_ID") and "SLURM_STEP_ID" in environ


def submission(folder: RunFolder, script: Path, cwd: Path) -> list[str]:
    """The words that submit a script. Raises ConfigError for a path that sbatch cannot take."""
    output = str(folder.slurm / "job-%j.log")
    if "\\" in output:
        raise ConfigError(f"{folder.path}: sbatch reads a backslash in a path as its own; choose another run.root")
    output = str(folder.slurm).replace("%", "%%") + "/job-%j.log"
    return ["sbatch", "--parsable", f"--chdir={cwd}", f"--output={output}", str(script)]
