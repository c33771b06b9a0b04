"""README.md of an exported model, as the hub reads it: how it was trained, on what, what was measured with which
uncertainty, against which control, what is not known, and how to use it. Made from a run's folder alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from opsd_cli import __version__
from opsd_cli.insight.history import History, find_runs, try_read
from opsd_cli.insight.versus import compared, differing
from opsd_cli.run.summary import pick
from opsd_cli.safety.secrets import redact
from opsd_cli.safety.terminal import escape_controls

Kind = Literal["model", "merged", "adapter"]
MOST_SIBLINGS = 200  # runs beside this one that are looked at for a control arm, the newest
MARKS = re.compile(r"([\\`*_{}\[\]<>|#!])")
KIND = {
    "model": "all weights were trained",
    "merged": "a LoRA adapter was trained; here it is merged into the weights, and stands by itself in `adapter/`",
    "adapter": "a LoRA adapter, to be loaded with the base model",
}


@dataclass(frozen=True)
class Written:
    """What was written, beside what the run's folder tells."""

    step: int
    kind: Kind
    dtype: torch.dtype  # of the weights
    note: str  # what merging or rounding lost
    base_folder: Path | None  # where the base model's own files are
    command: str  # that wrote it


def model_card(run: History, written: Written, *, control: History | None = None) -> str:
    """The whole file. What the run's folder holds of names and messages is shown as plain text."""
    parts = [
        _front(run, written),
        f"# {plain(run.name)}",
        _first_words(run, written),
        "## Results\n\n" + "\n".join(_results(run, written, control)),
        "## Method\n\n" + "\n".join(_method(run, written)),
        "## Data\n\n" + "\n".join(_data(run)),
        "## How to use it\n\n" + _use(run, written),
        "## Limits\n\n" + "\n".join(_limits(run, written, control)),
        "## Reproduce\n\n" + "\n".join(_reproduce(run, written)),
    ]
    return redact(escape_controls("\n\n".join(parts) + "\n"))


def find_control(run: History) -> History | None:
    """A finished run beside this one (or in the same sweep) that differs only in its context, which shows the teacher
    nothing of use: another problem's solution, a part of it, or none."""
    root = run.folder.path.parent
    found = sorted(find_runs(root), key=lambda pair: pair[1].stat().st_mtime, reverse=True)
    for name, path in found[:MOST_SIBLINGS]:
        other = try_read(path, name=name, points=1) if path != run.folder.path else None
        if other is None or other.state != "completed" or other.summary["after"] is None or not is_control(other):
            continue
        differs = {key for key in differing([run, other]) if not key.startswith(("run.", "context.", "launcher."))}
        if not differs and not is_control(run):
            return other
    return None


def is_control(run: History) -> bool:
    """Whether the teacher of a run saw nothing of use."""
    return run.settings.get("context.control", "none") != "none" or run.settings.get("context.name") == "none"


def plain(text: object) -> str:
    """Text from elsewhere as Markdown that shows it as it is, on one line."""
    return MARKS.sub(r"\\\1", " ".join(str(text).split()))


def _front(run: History, written: Written) -> str:
    """The YAML that the hub reads."""
    settings, base = run.settings, _base_metadata(written.base_folder)
    named = {key: value for key in ("language", "license", "license_name", "license_link") if (value := base.get(key))}
    path, dataset = str(settings.get("model.path", "")), str(settings.get("dataset.path", ""))
    facts = ModelCardData(
        base_model=path if _is_hub_id(path) else None,
        datasets=[dataset] if _is_hub_id(dataset) else None,
        library_name="peft" if written.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["opsd", "self-distillation", "on-policy-distillation", *(["lora"] if written.kind != "model" else [])],
        eval_results=list(_eval_results(run, written)) or None,
        model_name=run.name,
        **named,
    )
    return f"---\n{facts.to_yaml()}\n---"


def _eval_results(run: History, written: Written) -> Iterator[EvalResult]:
    after = pick(run.summary["evaluations"], "student", step=written.step)
    if after is not None:
        dataset = str(run.settings.get("dataset.path") or run.settings.get("dataset.name", "dataset"))
        name = dataset if _is_hub_id(dataset) else str(run.settings.get("dataset.name", "dataset"))
        yield EvalResult(
            task_type="text-generation", dataset_type=name, dataset_name=name, dataset_split=after["split"],
            metric_type="accuracy", metric_value=round(after["accuracy"], 4),
            metric_name=f"accuracy, {after['problems']} problems, 95 % interval {after['low']:.3f} to "
            f"{after['high']:.3f}",
        )  # fmt: skip


def _base_metadata(folder: Path | None) -> dict[str, Any]:
    if folder is not None:
        with suppress(OSError, ValueError, yaml.YAMLError):
            return dict(ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict())
    return {}


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists() and path[0] != "."


def shown_path(path: object) -> str:
    """A hub id as it is; of a path on this machine the last part alone, which says nothing of who wrote it."""
    text = str(path)
    return text if _is_hub_id(text) or text.startswith("bundled:") else text.rstrip("/").rpartition("/")[2]


def _first_words(run: History, written: Written) -> str:
    steps = run.settings.get("train.steps", "?")
    lines = [
        f"{plain(shown_path(run.settings.get('model.path')))} trained by on-policy self-distillation with "
        f"opsd {__version__}: the model writes completions itself, and learns "
        "from its own predictions on them when it is also shown the reference solution.",
        f"These are the weights after step {written.step} of {steps}, in {str(written.dtype).removeprefix('torch.')}; "
        f"{KIND[written.kind]}.",
    ]
    if run.state != "completed":
        lines.append(f"The run was **{run.state}** when this was written: it had not done all its steps.")
    if is_control(run):
        lines.append("**This is a control arm**: its teacher was shown nothing of use.")
    if written.note:
        lines.append(f"{written.note[0].upper()}{written.note[1:]}.")
    return "\n\n".join(lines)


def _share(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "not measured"
    low, high = 100 * evaluation["low"], 100 * evaluation["high"]
    return f"{100 * evaluation['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"


def _results(run: History, written: Written, control: History | None) -> Iterator[str]:
    evaluations, step = run.summary["evaluations"], written.step
    first = pick(evaluations, "student", step=0)
    if first is None and pick(evaluations, "student", step=step) is None:
        yield "Nothing was measured."
        return
    yield f"| accuracy, 95 % interval | before | at step {step} |"
    yield "|---|---|---|"
    rows: list[tuple[str, Literal["student", "teacher"], bool]] = [
        ("without the solution (how it is used)", "student", False),
        ("shown the solution (as teacher)", "teacher", False),
        ("a skill that training never showed", "student", True),
    ]
    for label, role, kept in rows:
        pair = [pick(evaluations, role, step=at, retention=kept) for at in (0, step)]
        if any(pair):
            yield f"| {label} | {_share(pair[0])} | {_share(pair[1])} |"
    if control is not None:
        pair = [pick(control.summary["evaluations"], "student", step=at) for at in (0, step)]
        context = plain(control.settings.get("context.name"))
        yield f"| control arm, context={context} | {_share(pair[0])} | {_share(pair[1])} |"
    yield ""
    yield from _words_on_results(run, written, control)


def _words_on_results(run: History, written: Written, control: History | None) -> Iterator[str]:
    counted = run.summary["before"] or run.summary["after"]
    if counted:
        heat = run.settings.get("eval.temperature", 0.0)
        how = "greedy" if not heat else f"temperature {heat}"
        yield (
            f"{counted['problems']} problems of the {plain(counted['split'])} split, {how}, at most "
            f"{run.settings.get('eval.max_completion_tokens')} tokens."
        )
    change = run.summary["change"]
    if change is not None and change["step"] == written.step:
        yield f"Before and after, problem by problem: {_paired(change)}."
    # The completions that are compared are those of both ends: of no other step may that be said.
    is_end = run.summary["after"] is not None and run.summary["after"]["step"] == written.step
    if control is not None and is_end and (against := compared(control, run)) is not None:
        yield f"Against the control arm at its end: {_paired(against)}."
    elif control is None and not is_control(run):
        yield (
            "No control arm was found beside this run: how much of the change comes from the solutions, and how much "
            "from training on own completions alone, was not measured (`context=shuffled`)."
        )


def _paired(comparison: Mapping[str, Any]) -> str:
    gain, low, high = (100 * comparison[name] for name in ("gain", "low", "high"))
    noise = "" if comparison["p_value"] < 0.05 else ", which may be noise"
    return (
        f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}], {comparison['won']} won and {comparison['lost']} lost, "
        f"p = {comparison['p_value']:.2g} (exact McNemar){noise}"
    )


def _method(run: History, written: Written) -> Iterator[str]:
    told = run.settings
    for part in ("teacher", "context", "sampler", "divergence"):
        yield f"- {part}: {plain(told.get(f'{part}.name', '?'))}"
    yield f"- learning rate {told.get('optim.lr')}, schedule {plain(told.get('optim.schedule'))}"
    yield (
        f"- {run.summary['steps']} steps of {told.get('train.problems_per_step')} problems, "
        f"{told.get('train.rollouts_per_problem')} completions each: {run.summary['completion_tokens']:,} tokens in "
        f"{run.summary['training_seconds']:,.0f} s on {run.summary.get('ranks')} x {plain(run.summary.get('device'))}"
        + (f"; these weights saw the first {written.step} steps" if written.step < run.summary["steps"] else "")
    )
    yield f"\nThe student saw:\n\n{_quoted(told.get('context.student'))}"
    yield f"\nThe teacher, the same weights or earlier ones, saw:\n\n{_quoted(told.get('context.teacher'))}"


def _quoted(text: object) -> str:
    """Text from elsewhere as a block of code that it cannot end."""
    return "\n".join(f"    {line}" for line in str(text).splitlines() or [""])


def _data(run: History) -> Iterator[str]:
    started = run.of_kind("run_started")
    plan = [str(line) for line in started[-1].get("plan", [])] if started else []
    for line in plan:
        if line.startswith(("training:", "test:", "validation:", "retention:")):
            yield f"- {plain(line)}"
    path = run.settings.get("dataset.path")
    yield f"- dataset={plain(run.settings.get('dataset.name'))}" + (f", {plain(shown_path(path))}" if path else "")
    yield f"- seed {run.settings.get('run.seed')}, fingerprint {str(run.summary.get('dataset_fingerprint'))[:16]}"


def _use(run: History, written: Written) -> str:
    base = shown_path(run.settings.get("model.path"))
    if written.kind == "adapter":
        return (
            "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder\n'
            'model = AutoPeftModelForCausalLM.from_pretrained(".")  # fetches or opens the base model\n```\n\n'
            f"vLLM: `vllm serve BASE --enable-lora --lora-modules trained=THIS_FOLDER`, BASE being {plain(base)}."
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder\n'
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'chat = [{"role": "user", "content": "..."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))\n```\n\n"
        "`opsd generate THIS_FOLDER --chat` talks to it; `vllm serve THIS_FOLDER` serves it."
    )


def _limits(run: History, written: Written, control: History | None) -> Iterator[str]:
    yield "- Measured on the dataset it was trained for; other abilities only as far as the table says."
    if (after := pick(run.summary["evaluations"], "student", step=written.step)) is None:
        yield f"- Accuracy was not measured at step {written.step}."
    elif after["problems"] < 200:
        yield f"- {after['problems']} problems are few: see the interval."
    if run.settings.get("eval.split") == "test" and run.settings.get("eval.every"):
        yield "- The test split was measured while training: what was chosen by it is no longer unseen."
    yield "- Not examined for safety, bias or truth; it inherits what its base model has."
    for message in dict.fromkeys(str(event.get("message")) for event in run.of_kind("warning")):
        yield f"- The run warned: {plain(message)}"


def _reproduce(run: History, written: Written) -> Iterator[str]:
    yield _quoted("\n".join([run.typed or "opsd train ...", written.command]))
    versions = run.summary.get("versions") or {}
    yield ""
    yield "With " + ", ".join(f"{plain(name)} {plain(version)}" for name, version in versions.items()) + "."
