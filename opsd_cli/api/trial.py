"""A recipe tried in small on its live model: student against teacher, sampler against trainer, the export read back,
one step."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opsd_cli.api.measured_session import MeasuredSession
from opsd_cli.data.contexts import Context
from opsd_cli.data.problems import Rollout
from opsd_cli.engine.disk_space import check_space
from opsd_cli.engine.loaded_weights import has_dropout
from opsd_cli.engine.loading import load_tokenizer
from opsd_cli.engine.model_limits import longest_completion
from opsd_cli.insight.findings import Findings
from opsd_cli.insight.machine import existing
from opsd_cli.rank.drift_monitor import PARTED_NATS
from opsd_cli.rank.run_data import make_renderer
from opsd_cli.sampling.samplers import own_decoder
from opsd_cli.sampling.vllm import VllmSampler
from opsd_cli.settings.config import Config
from opsd_cli.settings.registry import CompletesPrompt
from opsd_cli.teachers.teachers import External

TRIAL_PROBLEMS, TRIAL_TOKENS = 4, 48
SAME_NATS = 1e-4  # mean divergence of two passes that are one, in float32
SAME_NATS_IN_HALF = 1e-2
ROUNDING = {torch.float32: 0.01}  # mean gap of the sampler's log-probabilities to the trainer's
ROUNDING_IN_HALF = 0.15


def trial_config(config: Config) -> Config:
    """The same run in small: few problems, short completions, every token counted, drawn as the loss sees them."""
    tokens = min(TRIAL_TOKENS, config.sampling.max_completion_tokens)
    train = config.train
    rollouts = min(train.rollouts_per_problem, 2)
    sampling = replace(
        config.sampling, max_completion_tokens=tokens, temperature=config.loss.temperature, top_p=1.0, top_k=0
    )
    return replace(
        config,
        train=replace(
            train, problems_per_step=min(train.problems_per_step, TRIAL_PROBLEMS), rollouts_per_problem=rollouts
        ),
        sampling=sampling,
        sampler=_drawn_here(config),
        # Rows of the run's full length are still what the model is tried with.
        eval=replace(config.eval, problems=0, max_completion_tokens=longest_completion(config)),
        loss=replace(config.loss, mask_truncated=False),
        tokens=replace(config.tokens, keep="all", pass_powers=(0.0, 0.0)),
    )


def _drawn_here(config: Config) -> Any:
    """The sampler, or our own decoder in place of vLLM, which starts with a run."""
    sampler = config.sampler
    if not isinstance(sampler, VllmSampler):
        return sampler
    return own_decoder(config.eval, prompt=sampler.prompt, dataset_share=sampler.dataset_share)


def try_out(findings: Findings, config: Config, device: torch.device, tell: Callable[[str], None]) -> None:
    tell("building the model and its teacher")
    session = findings.attempt("model", "build", lambda: MeasuredSession(trial_config(config), device=device))
    if session is None:
        return
    with session:
        said = "logits are the model's own, rows do not depend on their neighbours"
        merges = ", the adapter merges" if config.lora.rank else ""
        findings.add("model", "build", "ok", said + merges)
        for message in session.warnings:
            if not any(one.message == message for one in findings.found):
                findings.add("model", "drawing", "warning", message)
        _dropout(findings, config, session)
        tell("comparing student, teacher and sampler")
        rollouts = findings.attempt("run", "sample", lambda: _sample(session))
        if rollouts:
            _compare_roles(findings, config, session, rollouts)
        tell("writing the model and reading it back")
        _export(findings, config, session)
        tell("trying one step")
        _dry_step(findings, config, session)


def _sample(session: MeasuredSession) -> list[Rollout]:
    pairs = session.render(session.problems[: max(2, TRIAL_PROBLEMS)])
    return [rollout for rollout in session.sample(pairs) if rollout.completion_ids]


def _dropout(findings: Findings, config: Config, session: MeasuredSession) -> None:
    if has_dropout(session.model):
        change = "model.dropout=false lora.dropout=0, unless you want it"
        message = "dropout is on: in training the student differs from its own teacher by chance"
        findings.add("model", "dropout", "warning", message, change)
    else:
        findings.add("model", "dropout", "ok", "nothing that is computed in training depends on chance")


def _compare_roles(findings: Findings, config: Config, session: MeasuredSession, rollouts: Sequence[Rollout]) -> None:
    """Divergence 0 without privilege and above 0 with it, and the sampler against the trainer."""
    half = session.dtype != torch.float32
    if session.has_teacher and not isinstance(config.teacher, External) and config.target.kind == "teacher":
        same = [
            replace(one, prompt=replace(one.prompt, teacher_ids=one.prompt.student_ids, other_ids=()))
            for one in rollouts
        ]
        apart = _mean(session.teacher_kl(same))
        if config.target.temperature != 1.0:
            pass  # the teacher is sharpened on purpose
        elif not apart <= (SAME_NATS_IN_HALF if half else SAME_NATS):
            findings.add(
                "teacher", "same_weights", "error",
                f"shown the same prompt, teacher and student differ by {apart:.3g} nats a token, and should not at all",
                "switch off what depends on chance or on the role (dropout, a teacher's own settings)",
            )  # fmt: skip
        else:
            findings.add(
                "teacher", "same_weights", "ok", f"shown the same prompt they are one ({apart:.1g} nats a token)"
            )
    if session.has_teacher and all(one.prompt.teacher_ids for one in rollouts) and not session.shows_rollouts:
        _with_privilege(findings, config, _mean(session.teacher_kl(rollouts)), half=half)
    _against_sampler(findings, config, session, rollouts)


def _with_privilege(findings: Findings, config: Config, apart: float, *, half: bool) -> None:
    if apart > (SAME_NATS_IN_HALF if half else SAME_NATS):
        findings.add(
            "teacher", "divergence", "ok", f"with what the teacher is shown they differ by {apart:.3g} nats a token"
        )
        return
    control = "that is a control: the objective is 0 until the weights have moved"
    is_control = Context(config.context).teacher == Context(config.context).student
    findings.add(
        "teacher", "divergence", "warning" if is_control else "error",
        f"what the teacher is shown changes nothing ({apart:.1g} nats a token), so there is nothing to learn"
        + (f"; {control}" if is_control else ""),
        "choose a context that shows the teacher more, such as context=solution",
    )  # fmt: skip


def _against_sampler(findings: Findings, config: Config, session: MeasuredSession, rollouts: Sequence[Rollout]) -> None:
    prompt = config.sampler.prompt if isinstance(config.sampler, CompletesPrompt) else "student"
    drawn = [rollout for rollout in rollouts if rollout.logprobs]
    if not drawn or prompt != "student":
        findings.add("run", "sampler", "ok", "completions do not come from the student, and are not compared with it")
        return
    own = session.logprobs(drawn)
    theirs = [value for rollout in drawn for value in rollout.logprobs]
    gap = _mean([abs(a - b) for a, b in zip(own, theirs, strict=True)])
    message = f"the sampler's log-probabilities lie {gap:.2g} nats a token from the trainer's"
    if gap > PARTED_NATS:
        change = "use sampler=static; completions come from another distribution than the one that is trained"
        findings.add("run", "sampler", "error", message, change)
    elif gap > ROUNDING.get(session.dtype, ROUNDING_IN_HALF):
        change = "model.dtype=float32, or loss.importance_cap=2 to correct for it"
        findings.add("run", "sampler", "warning", f"{message}, more than rounding explains", change)
    else:
        findings.add("run", "sampler", "ok", message)


def _export(findings: Findings, config: Config, session: MeasuredSession) -> None:
    """The untrained model, written and read back, with its tokenizer and template."""
    root = existing(Path(config.run.root))
    findings.attempt("run", "disk", lambda: _space(config, session, root))
    with tempfile.TemporaryDirectory(prefix=".opsd-doctor-", dir=root) as folder:
        written = findings.attempt("run", "export", lambda: session.save_model(Path(folder) / "model"))
        if written is None:
            return
        size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
        pair = session.render(session.problems[:2])[0]
        again = findings.attempt("run", "export", lambda: _rendered_by(config, session, written))
        if again is not None and again != pair.student_ids:
            message = "the exported tokenizer renders another prompt than the one that is trained with"
            findings.add("run", "export", "error", message, "report this model; keep its own tokenizer files beside it")
        elif again is not None:
            findings.add(
                "run",
                "export",
                "ok",
                f"written and read back: every tensor and the prompts ({size / 2**20:,.0f} MiB)",
            )


def _space(config: Config, session: MeasuredSession, root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".opsd-doctor-", dir=root) as folder:
        check_space(Path(folder), session.policy, config, dtype=session.dtype)


def _rendered_by(config: Config, session: MeasuredSession, folder: Path) -> tuple[int, ...]:
    """The first problem's prompt, as whoever loads the exported model makes it."""
    tokenizer = load_tokenizer(replace(session.source, path=str(folder), revision=None, cached_only=True))
    renderer = make_renderer(config, tokenizer)
    try:
        return renderer.render(session.problems[:2], seed=config.run.seed)[0][0].student_ids
    finally:
        renderer.close()


def _dry_step(findings: Findings, config: Config, session: MeasuredSession) -> None:
    events = findings.attempt("run", "step", lambda: list(session.train(1)))
    if not events:
        return
    found = events[0]["metrics"]
    norm, objective = found.get("optim/grad_norm", 0.0), found.get("loss/objective", math.nan)
    if found.get("optim/skipped") or not math.isfinite(objective):
        findings.add(
            "run", "step", "error", f"the first step's loss ({objective:.3g}) or gradient is not finite",
            "model.dtype=float32, or loss.logits_dtype=float32",
        )  # fmt: skip
        return
    tokens, seconds, peak = (found[name] for name in ("tokens/completion", "time/step", "memory/peak_gib"))
    message = (
        f"one small step: objective {objective:.3g}, gradient norm {norm:.3g}, {tokens:.0f} tokens, {seconds:.1f} s, "
        f"{peak:.1f} GiB at most"
    )
    if norm == 0.0:
        change = "look at tokens.* and divergence.*, or at a teacher that is the student"
        findings.add("run", "step", "warning", f"{message}: nothing would be learnt", change)
    else:
        findings.add("run", "step", "ok", message)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
