"""A run that is on disk, read for a notebook."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas

import opsd_cli.plugins  # noqa: F401 - fills the registries
from opsd_cli.insight.samples import read_samples, token_class
from opsd_cli.insight.trackers import SAMPLE_COLUMNS, sample_rows
from opsd_cli.run.evaluations import NAME, read_completions
from opsd_cli.run.events import read_events
from opsd_cli.run.folder import open_run_folder, read_config
from opsd_cli.settings.config import Config
from opsd_cli.settings.plugin_files import use_plugins
from opsd_cli.settings.typed_config import typed_config


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder, read when it is first asked for."""

    path: Path

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The frozen config as plain dicts."""
        return read_config(open_run_folder(self.path))

    @cached_property
    def config(self) -> Config:
        """The frozen config, typed. Raises ConfigError where it needs a plug-in that was not loaded: give its file to
        `load_run(path, plugins=[...])`."""
        return typed_config(self.tree)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Every line of events.jsonl, in order."""
        return list(read_events(self.path / "events.jsonl"))

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The rollouts of samples.jsonl, each with its prompts, completion, reward and divergence by token. A line that
        is not whole, such as the last one of a run that is going on, is left out."""
        file, found = self.path / "samples.jsonl", []
        for line in file.read_bytes().split(b"\n") if file.is_file() else ():
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return found

    @cached_property
    def evaluations(self) -> dict[tuple[int, str, str], list[dict[str, Any]]]:
        """(step, split, role) -> every completion of that evaluation, with question, answer and whether it is right."""
        found = {}
        for file in sorted((self.path / "evaluations").glob("step_*.jsonl")):
            if name := NAME.fullmatch(file.name):
                found[int(name["step"]), name["split"], name["role"]] = list(read_completions(file).values())
        return found

    def frame(self, what: Literal["steps", "evaluations", "samples", "tokens"]) -> pandas.DataFrame:
        """A table: of `steps`, a row each with its metrics; of `evaluations`, a row each with accuracy and interval; of
        `samples`, a row for each sample rollout; of `tokens`, a row for each of their tokens with its text, its class
        (style, number, other) and its divergence in nats (NaN where the rollout carried no loss)."""
        if what == "steps":
            steps = [event for event in self.events if event["kind"] == "step"]
            return pandas.DataFrame([{"step": event["step"], **event["metrics"]} for event in steps])
        if what == "evaluations":
            return pandas.DataFrame([event for event in self.events if event["kind"] == "evaluation"])
        samples = read_samples(self.path / "samples.jsonl")
        if what == "samples":
            return pandas.DataFrame(sample_rows(samples), columns=list(SAMPLE_COLUMNS))
        rows = [
            (number, sample.step, sample.problem, place, token.text, token_class(token.text), token.divergence)
            for number, sample in enumerate(samples)
            for place, token in enumerate(sample.tokens)
        ]
        columns = ["sample", "step", "problem", "place", "text", "class", "divergence"]
        return pandas.DataFrame(rows, columns=columns).astype({"divergence": float})

    def metric(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric of docs/outputs.md, such as loss/objective, at every step that has it."""
        steps = (event for event in self.events if event["kind"] == "step")
        return [(event["step"], event["metrics"][name]) for event in steps if name in event["metrics"]]


def load_run(path: str | Path, *, plugins: Sequence[str | Path] = ()) -> Run:
    """The run in a folder, or of that name under ./runs. Raises ConfigError, with the nearest name, where there is
    none."""
    if plugins:
        use_plugins(plugins)
    return Run(open_run_folder(path).path)
