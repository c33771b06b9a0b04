"""What every task of one rank holds on to: its config, its place among the ranks, its recorder, the flag that asks it
to stop."""

from __future__ import annotations

import os

from opsd_cli.checks import check_config
from opsd_cli.engine.device import align_local_rank, card_of, forbid_reduced_precision, names_of, pick_device
from opsd_cli.engine.process_group import Ranks, connect, patience_for
from opsd_cli.rank.recorder import Recorder, versions
from opsd_cli.rank.run_data import RunData, load_run_data
from opsd_cli.run.folder import RunFolder, read_config
from opsd_cli.run.heartbeat import Heartbeat
from opsd_cli.settings.config import Config
from opsd_cli.settings.typed_config import typed_config
from opsd_cli.training.interruptions import StopFlag, StopRequested


class Rank:
    """One process of a run."""

    def __init__(self, folder: RunFolder, task: str) -> None:
        self.folder, self.task = folder, task
        self.stop = StopFlag()
        self.stop.listen()
        number = int(os.environ["RANK"])
        self.heartbeat = Heartbeat(folder, number)
        self.recorder = Recorder(folder, is_writer=number == 0)
        self.config: Config = check_config(typed_config(read_config(folder)))
        self.device = pick_device(os.environ)
        forbid_reduced_precision()
        align_local_rank(os.environ, self.device)
        limits = self.config.launcher
        patience = patience_for(stall_seconds=limits.stall_seconds, save_seconds=limits.save_seconds)
        self.ranks: Ranks = connect(self.device, self.heartbeat.waiting, patience=patience)
        self.cards = self.ranks.gather(card_of(self.device))
        self.step = 0  # steps done
        self.is_trained = False  # all steps are done: as many as asked for, or as the seconds allowed
        self.warned: set[str] = set()  # names of warnings that were given

    def load_data(self, *, train: bool) -> RunData:
        """Read data and tokenizer and render the prompts, in shares. Collective."""
        return load_run_data(
            self.config, self.cards, self.report_phase, train=train, tell_done=self.report_done, ranks=self.ranks
        )

    @property
    def is_at_an_end(self) -> bool:
        """Before the first step, or after the last."""
        return self.step in (0, self.config.train.steps) or self.is_trained

    def report_phase(self, phase: str) -> None:
        """Report a long phase to where the user sees it."""
        self.heartbeat.enter(phase)
        self.recorder.progress(phase)

    def report_done(self, phase: str, done: int, total: int) -> None:
        """Report how far a long phase is, and stop here if any rank was asked to. Collective."""
        self.heartbeat.beat()
        self.recorder.progress(phase, done=done, total=total)
        self.leave_if_asked()

    def should_stop(self) -> bool:
        """Whether this rank was asked to stop. Asked once per token and once per micro-batch: a sign of life too."""
        self.heartbeat.beat()
        return self.stop.is_set()

    def leave_if_asked(self) -> None:
        """Stop here, on every rank, if any was asked to: between two parts of loading."""
        if self.ranks.any(self.stop.is_set()):
            raise StopRequested

    def warn(self, message: str, *, name: str = "") -> None:
        """Record a warning; one that is given once has a name, by which a resume knows it."""
        self.recorder.write("warning", message=message, **({"name": name} if name else {}))

    def warn_once(self, message: str, *, name: str) -> None:
        """Record a warning unless one of this name was recorded in this run."""
        if name not in self.warned:
            self.warned.add(name)
            self.warn(message, name=name)

    def record_start(
        self, run_data: RunData, *, parameters: int = 0, trainable_parameters: int = 0, model_fingerprint: str = ""
    ) -> None:
        """Write the event that opens an attempt. A task that trains nothing has no steps."""
        train, trains = self.config.train, trainable_parameters > 0
        self.recorder.write(
            "run_started",
            run=self.folder.name,
            task=self.task,
            steps=train.steps if trains else 0,
            start_step=self.step,
            problems_per_step=train.problems_per_step if trains else 0,
            rollouts_per_problem=train.rollouts_per_problem if trains else 0,
            ranks=self.ranks.world_size,
            device=names_of(self.cards),
            parameters=parameters,
            trainable_parameters=trainable_parameters,
            versions=versions(),
            dataset_fingerprint=run_data.splits.fingerprint,
            plan=run_data.notes,
            **({"model_fingerprint": model_fingerprint} if model_fingerprint else {}),
            **({"max_seconds": train.seconds} if trains and train.seconds is not None else {}),
        )
        if self.step == 0:
            for name, message in run_data.warnings.items():
                self.warn_once(message, name=name)
