"""The task `train` of one rank: load, resume, run the steps, evaluate, export. What is written and watched while
`training.loop.fit` runs; the algorithm is there, the parts are built in `rank.build`."""

from __future__ import annotations

import time
from functools import partial

import torch

from opsd_cli.checks import check_ranks
from opsd_cli.engine.checkpoint import CheckpointStore, RunState, refuse_another_run
from opsd_cli.engine.disk_space import check_space
from opsd_cli.engine.export import Exporter, folder_of
from opsd_cli.engine.fingerprint import fingerprint
from opsd_cli.engine.saved_weights import step_of
from opsd_cli.engine.weight_copies import parameter_counts, share_beyond_bfloat16
from opsd_cli.insight.history import read_history
from opsd_cli.insight.model_card import Kind, Written, model_card
from opsd_cli.rank.advice import about_bfloat16_states, about_same_prompts
from opsd_cli.rank.alarms import Alarms, GuardStop
from opsd_cli.rank.build import build_completer, build_parts, build_policy
from opsd_cli.rank.build_zero import build_engine
from opsd_cli.rank.context import Rank
from opsd_cli.rank.drift_monitor import NO_SIGNAL, DriftMonitor
from opsd_cli.rank.from_initial import from_initial
from opsd_cli.rank.measure import RETENTION, measure
from opsd_cli.rank.plan import predicted_line, training_plan
from opsd_cli.rank.recorder import sample_lines, versions
from opsd_cli.rank.run_data import RunData
from opsd_cli.run.events import JsonLines, read_events
from opsd_cli.run.folder import shell_path
from opsd_cli.sampling.vllm import VllmSampler
from opsd_cli.settings.errors import GuardError, OutsideError
from opsd_cli.settings.resume_rules import identity_hash, identity_of
from opsd_cli.settings.typed_config import plain_tree
from opsd_cli.training.loop import due, fit
from opsd_cli.training.step_report import StepReport

DRAWN_AHEAD = "drawn_ahead.json"
"""File of a checkpoint: what `sampling.apart` keeps."""


def train(rank: Rank) -> None:
    """From the frozen config to `model/`."""
    run_data = rank.load_data(train=True)
    rank.leave_if_asked()
    training = Training(rank, run_data)
    training.resume()
    training.run()
    training.completer.close()
    training.export()
    run_data.close()


class Training:
    """One attempt at a run: everything that is alive from loading to export."""

    def __init__(self, rank: Rank, run_data: RunData) -> None:
        self.rank, self.run_data = rank, run_data
        self.config = config = rank.config
        check_ranks(config, rank.ranks.world_size)
        if isinstance(config.sampler, VllmSampler):
            config.sampler.check_machines(rank.ranks)
        rank.report_phase("loading the model")
        self.policy, view, self.rows = build_policy(
            config, run_data.source, rank.device, rank.ranks, shards=config.zero.stage == 3
        )
        check_space(rank.folder.path, self.policy, config, dtype=run_data.source.dtype)
        self.model_fingerprint = fingerprint(self.policy.causal)
        rank.leave_if_asked()
        rank.report_phase("starting DeepSpeed")
        self.engine = build_engine(config, self.policy, view, rank.ranks, run_data.source, rank.device)
        self.completer = build_completer(self.engine, rank.ranks, run_data, self.policy.causal, rank.warn)
        should_stop, enter = rank.should_stop, rank.heartbeat.enter
        self.parts = build_parts(config, self.engine, self.completer, run_data, should_stop, enter=enter)
        rank.leave_if_asked()
        self.store = CheckpointStore(rank.folder.checkpoints, self.engine, keep_last=config.checkpoint.keep_last)
        self.samples = JsonLines(rank.folder.samples) if rank.recorder.is_writer else None
        self.drift = from_initial(config, self.engine, self.parts)
        self.monitor = DriftMonitor(config.guard, config.train)
        self.alarms = Alarms(rank, self.monitor)
        self.identity = identity_of(plain_tree(config))
        self.updates = 0  # made so far
        self._measured: set[int] = set()  # steps before this attempt after which held-out accuracy is known
        self._saved: int | None = None  # step of the newest checkpoint
        self._budget = self.parts.budget.tokens
        self._drawn_ahead = ""  # of the checkpoint that is resumed from

    def run(self) -> None:
        """Evaluate, take the steps, evaluate. A guard that stops the run leaves the best weights loaded."""
        rank, config = self.rank, self.rank.config
        evaluates = bool(self.run_data.eval_prompts)
        plan = training_plan(config, self.engine, self.completer, self.rows, evaluates=evaluates)
        plan += predicted_line(config, self.run_data, ranks=rank.ranks.world_size, device=rank.device)
        self.run_data.notes.extend(plan)
        if self._drawn_ahead and self.completer.apart is not None:
            self.completer.apart.restore(self._drawn_ahead)
        rank.record_start(self.run_data, model_fingerprint=self.model_fingerprint, **parameter_counts(self.policy))
        if config.optim.state_dtype == "bfloat16":
            lost = share_beyond_bfloat16(self.policy, config.optim.lr)
            self.alarms.warn_once(about_bfloat16_states(config, lost))
        if not self.run_data.renderer.needs_feedback:
            self.alarms.warn_once(about_same_prompts(config, self.run_data.train_prompts.rendered))
        try:
            self.catch_up()
            fit(self.parts, self, start=rank.step, updates=self.updates)
            rank.is_trained = True
        except GuardStop as stop:
            self.restore_best(str(stop))
        if NO_SIGNAL not in self.rank.warned:  # which has named the same cause
            self.alarms.warn_of(self.monitor.verdict_at_end())
        if config.train.steps > 0 or not config.eval.before:
            self.measure()

    def catch_up(self) -> None:
        """Measure where this attempt begins, unless that is done: before training, or where an earlier attempt was
        stopped between an update and its evaluation."""
        step, settings = self.rank.step, self.config.eval
        if step in self._measured:
            return
        if step == 0 and settings.before:
            self.measure()
        elif 0 < step < self.config.train.steps and not self.parts.time.is_used_up and due(step, settings.every):
            self.evaluate(step)

    def report(self, step: int, report: StepReport) -> None:
        self.rank.step = step
        self.updates += report.updates
        if self.samples is not None:
            for line in sample_lines(step, report.samples, self.run_data):
                self.samples.append(line)
        self.rank.recorder.write("step", step=step, metrics=report.metrics)
        before, self._budget = self._budget, self.parts.budget.tokens
        if (now := self._budget) < before:
            self.rank.warn(
                f"step {step} ran out of memory and was repeated from the same rollouts; micro-batches have at most "
                f"{now} tokens from here on. Set train.micro_batch_tokens={now} to begin with that (now "
                f"{self.rank.config.train.micro_batch_tokens})"
            )
        self.monitor.add_step(report.metrics)
        if report.refused:
            self.alarms.refuse(step, report)
        self.alarms.warn_of(self.monitor.spike())
        self.alarms.warn_of(self.monitor.parted())
        ends = step == self.config.train.steps or self.parts.time.is_used_up
        self.alarms.warn_of(self.monitor.first_sign(at_end=ends))
        self.alarms.act_on(self.monitor.verdict_on_step())

    def evaluate(self, step: int) -> None:
        """Measure while training runs; a new best is kept as a checkpoint of its own."""
        accuracy = self.measure()
        if accuracy is None:
            return
        verdict = self.monitor.verdict_on_accuracy(step, accuracy)
        if self.monitor.best_step == step:
            self.save(step)
            self.store.mark_best(step)
        self.alarms.act_on(verdict)

    def measure(self) -> float | None:
        """Held-out accuracy of the student; at both ends also what it retains of a skill that training never shows, and
        its accuracy under the teacher's prompt."""
        rank, run_data = self.rank, self.run_data
        if not run_data.eval_prompts:
            return None
        at_an_end, split = rank.is_at_an_end, rank.config.eval.split
        measure_on = partial(measure, rank, self.completer, run_data)
        if run_data.retention_prompts and at_an_end:
            measure_on(run_data.retention_prompts, role="student", split=RETENTION)
        drift = self.drift if rank.step > 0 else None  # 0 where nothing was learnt yet
        accuracy = measure_on(run_data.eval_prompts, role="student", split=split, drift=drift)
        fixed_context = not run_data.renderer.needs_feedback  # else it is made of rollouts: none here
        has_teacher = rank.config.teacher.plugin_name != "none"
        if rank.config.eval.teacher_prompt and has_teacher and fixed_context and at_an_end:
            measure_on(run_data.eval_prompts, role="teacher", split=split)
        return accuracy

    def save(self, step: int) -> None:
        """Publish the state after `step` steps, unless that is done: a best checkpoint may also be due, and a resumed
        run may be stopped before its first step."""
        if step == self._saved:
            return
        start, record = time.perf_counter(), self.rank.recorder
        before = record.offset()

        def state() -> RunState:
            seconds = round(time.perf_counter() - start, 3)
            record.write("checkpoint", step=step, path=f"checkpoints/step_{step:06d}", seconds=seconds)
            return RunState(
                step=step,
                world_size=self.rank.ranks.world_size,
                events_offset=record.offset(),
                samples_offset=self.samples.offset() if self.samples is not None else 0,
                dataset_fingerprint=self.run_data.splits.fingerprint,
                model_fingerprint=self.model_fingerprint,
                config_hash=identity_hash(self.identity),
                identity=self.identity,
                versions=versions(),
                updates=self.updates,
                seconds=self.parts.time.used,
            )

        files = {}
        if self.completer.apart is not None:
            waiting = partial(self.rank.report_phase, "waiting for the completions of the next step")
            files = {DRAWN_AHEAD: self.completer.apart.kept(step, waiting, self.rank.heartbeat.beat)}
        self.rank.report_phase("saving a checkpoint")
        try:
            self.store.save(step, self.parts.teacher, state=state, files=files)
        except OutsideError:
            if not self.store.is_published(step):
                record.truncate(before)  # the event of a checkpoint that is not there
            raise
        self._saved = step

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one, and take back what was written after it."""
        rank, checkpoint = self.rank, self.store.latest()
        if checkpoint is None:
            had_steps = any(event["kind"] == "step" for event in read_events(rank.folder.events))
            rank.ranks.barrier()  # all have read the events before rank 0 cuts them
            self._truncate_logs(0, 0)
            if had_steps:
                rank.warn("there is no checkpoint to resume from; the run starts again from its beginning")
            return
        rank.report_phase(f"loading {checkpoint.name}")
        state = self.store.load(checkpoint, self.parts.teacher)
        notes = refuse_another_run(
            checkpoint,
            state,
            data=self.run_data.splits.fingerprint,
            model=self.model_fingerprint,
            identity=self.identity,
            versions=versions(),
            ranks=rank.ranks.world_size,
        )
        drawn_ahead = checkpoint / DRAWN_AHEAD
        self._drawn_ahead = drawn_ahead.read_text(encoding="utf-8") if drawn_ahead.exists() else ""
        is_named = self.store.target_of("latest") == checkpoint
        self.updates = state.step if state.updates is None else state.updates
        self.parts.time.used = state.seconds
        self._truncate_logs(state.events_offset, state.samples_offset)
        rank.ranks.barrier()  # the others read the events that rank 0 has just cut
        self._restore_from_events(state.step)
        self.store.tidy(checkpoint)
        if not is_named:
            rank.warn(
                f"checkpoints/latest was missing or damaged; resumed from the newest complete one, {checkpoint.name}"
            )
        for note in notes:
            rank.warn(note)
        rank.leave_if_asked()

    def _restore_from_events(self, step: int) -> None:
        """Take up what the run knew after `step` steps, from its events."""
        events = read_events(self.rank.folder.events)
        self.monitor.replay(events)
        for event in events:
            if event["kind"] == "evaluation" and event["split"] != RETENTION:
                self._measured.add(event["step"])
            elif event["kind"] == "warning":
                self.rank.warned.add(event.get("name", ""))
        self.rank.step = self._saved = step
        if 0 < step == self.monitor.best_step:
            self.store.mark_best(step)  # a crash may have come between the checkpoint and its mark

    def _truncate_logs(self, events_offset: int, samples_offset: int) -> None:
        self.rank.recorder.truncate(events_offset)
        if self.samples is not None:
            self.samples.truncate(samples_offset)

    def restore_best(self, reason: str) -> None:
        """Load and export the best checkpoint by held-out accuracy, if one was kept, and end the run."""
        best = self.store.target_of("best")
        restored = "no checkpoint was measured while training (set eval.every), so none is restored"
        if best is not None:
            self.store.load(best, self.parts.teacher)
            self.export(step=step_of(best))
            restored = f"model/ holds the best one, {best.name}"
        raise GuardError(f"stopped by the guard at step {self.rank.step}: {reason}; {restored}")

    def export(self, *, step: int | None = None) -> None:
        """Write model/; `step` is that of the weights, where they are not the newest."""
        self.rank.report_phase("writing the model")
        card = partial(self.model_card, step=self.rank.step if step is None else step)
        model, run_data = self.config.model, self.run_data
        exporter = Exporter(
            run_data.source, run_data.tokenizer,
            export_dtype=model.export_dtype, own_template=model.chat_template is not None,
            end_ids=self.completer.end_ids, card=card,
        )  # fmt: skip
        if note := exporter.export(self.engine, self.rank.folder.model):
            self.rank.warn(note)

    def model_card(self, note: str, dtype: torch.dtype, *, step: int) -> str:
        """README.md of model/, which says what is known by now."""
        kind: Kind = "merged" if self.engine.has_adapter else "model"
        base, command = folder_of(self.run_data.source), f"opsd eval {shell_path(self.rank.folder.path)}"
        written = Written(step, kind, dtype, note, base, command)
        return model_card(read_history(self.rank.folder.path), written)
