"""What becomes of what the drift monitor sees: a warning, a stop by the guard, the end of a run whose updates are
refused."""

from __future__ import annotations

from opsd_cli.rank.context import Rank
from opsd_cli.rank.drift_monitor import NO_SIGNAL, DriftMonitor, Verdict
from opsd_cli.rank.recorder import write_suspects
from opsd_cli.run.folder import shell_path
from opsd_cli.settings.errors import GuardError
from opsd_cli.training.step_report import StepReport


class GuardStop(Exception):
    """The guard says stop; every rank says so at the same place."""


class Alarms:
    """Acts on the verdicts of a run's monitor as its `guard` settings say."""

    def __init__(self, rank: Rank, monitor: DriftMonitor) -> None:
        self.rank, self.monitor = rank, monitor

    def refuse(self, step: int, report: StepReport) -> None:
        """Keep what an update was refused for, and end the run when too many were refused in a row."""
        rank, times, patience = self.rank, self.monitor.refused_in_a_row, self.rank.config.guard.nonfinite_patience
        file = write_suspects(rank.folder, step, report, rank=rank.ranks.rank) if report.suspects else None
        files = [shell_path(file) for file in rank.ranks.gather(file) if file is not None]
        left = f"of step {step - 1}"
        if report.updates:
            left = f"after {report.updates} of the {rank.config.train.updates_per_step} updates of this step"
        message = (
            f"step {step}: the {report.refused} is not finite; the update was refused and the weights are those {left} "
            f"({times} in a row, guard.nonfinite_patience={patience}); the batch is in {', '.join(files)}"
        )
        if times < patience:
            rank.warn(message)
            return
        raise GuardError(
            f"{message}. Lower optim.lr (now {rank.config.optim.lr}) in a new run, or resume with "
            f"guard.nonfinite_patience={patience + 1} to pass over it"
        )

    def act_on(self, verdict: Verdict | None) -> None:
        """Do what `guard.action` says about a verdict."""
        if verdict is not None and self.rank.config.guard.action == "stop":
            raise GuardStop(verdict.message)
        if verdict is not None and verdict.name != NO_SIGNAL:
            verdict = verdict._replace(message=f"possible drift: {verdict.message}")
        self.warn_of(verdict)

    def warn_of(self, verdict: Verdict | None) -> None:
        """Warn of what the monitor has seen, unless nothing is to be watched."""
        if self.rank.config.guard.action != "off":
            self.warn_once(verdict)

    def warn_once(self, verdict: Verdict | None) -> None:
        """Warn, unless a warning of this name was given before."""
        if verdict is not None:
            self.rank.warn_once(verdict.message, name=verdict.name)
