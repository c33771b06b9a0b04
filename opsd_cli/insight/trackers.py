"""Where else a run may be shown: TensorBoard, Weights & Biases, trackio, MLflow. Each is an extra and gets the same few
calls; its own environment variables say where it writes and whether it is offline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opsd_cli.insight.samples import SampleRollout

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""Tracker -> the package that it needs."""

WITHOUT_PROJECTS = ("tensorboard",)
"""Trackers that write into the run's own folder, whatever the project is called."""

SAMPLE_COLUMNS = ("step", "problem", "prompt", "teacher_prompt", "completion", "answer", "reward", "divergence")


class Tracker(Protocol):
    """One run in one tracker. `identity` is the same whenever the same run is sent again."""

    def start(self, folder: Path, *, project: str, name: str, identity: str, settings: Mapping[str, Any]) -> None: ...

    def log(self, values: Mapping[str, float], *, step: int) -> None: ...

    def show(self, samples: Sequence[SampleRollout], *, step: int) -> None: ...

    def finish(self, results: Mapping[str, float], *, failed: bool) -> None: ...


def sample_rows(samples: Sequence[SampleRollout]) -> list[list[Any]]:
    """A row of SAMPLE_COLUMNS for each rollout; its divergence is the sum over its tokens, in nats."""
    return [
        [
            *(sample.step, sample.problem, sample.prompt, sample.teacher_prompt),
            "".join(token.text for token in sample.tokens),
            *(sample.answer, sample.reward, sum(token.divergence or 0.0 for token in sample.tokens)),
        ]
        for sample in samples
    ]


class TensorBoard:
    """Writes to the run's own folder: `tensorboard --logdir runs`."""

    def start(self, folder: Path, *, project: str, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()), 0)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def show(self, samples: Sequence[SampleRollout], *, step: int) -> None:
        for number, row in enumerate(sample_rows(samples)):
            text = "\n\n".join(f"{key}: {value}" for key, value in zip(SAMPLE_COLUMNS, row, strict=True))
            # Indented by four, Markdown shows text as it is.
            self._writer.add_text(f"samples/{number}", "\n".join(f"    {line}" for line in text.splitlines()), step)

    def finish(self, results: Mapping[str, float], *, failed: bool) -> None:
        self.log({f"result/{key}": value for key, value in results.items()}, step=0)
        self._writer.close()


class WandB:
    """Weights & Biases. WANDB_MODE=offline keeps everything in the run folder, to be sent later by `wandb sync`."""

    def start(self, folder: Path, *, project: str, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=project, name=name, id=identity, resume="allow", config=dict(settings), dir=str(folder)
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values), step=step)

    def show(self, samples: Sequence[SampleRollout], *, step: int) -> None:
        rows = sample_rows(samples)
        self._run.log({"samples": self._wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)}, step=step)

    def finish(self, results: Mapping[str, float], *, failed: bool) -> None:
        self._run.summary.update(dict(results))
        self._run.finish(exit_code=1 if failed else 0)


class Trackio:
    """trackio, which keeps runs on this machine (TRACKIO_DIR) and shows them with `trackio show`."""

    def start(self, folder: Path, *, project: str, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=project, name=identity, resume="allow", config={**settings, "run": name}, embed=False)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def show(self, samples: Sequence[SampleRollout], *, step: int) -> None:
        import pandas

        frame = pandas.DataFrame(sample_rows(samples), columns=list(SAMPLE_COLUMNS))
        self._trackio.log({"samples": self._trackio.Table(dataframe=frame)}, step=step)

    def finish(self, results: Mapping[str, float], *, failed: bool) -> None:
        self._trackio.log({f"result/{key}": value for key, value in results.items()})
        self._trackio.finish()


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI, or in ./mlruns.db."""

    def start(self, folder: Path, *, project: str, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri("sqlite:///mlruns.db")
        experiment = mlflow.set_experiment(project)
        known = mlflow.search_runs([experiment.experiment_id], f"tags.opsd_run = '{identity}'", output_format="list")
        if known:
            mlflow.start_run(run_id=known[0].info.run_id)
            return
        mlflow.start_run(run_name=name, tags={"opsd_run": identity})
        mlflow.log_params({key: str(value)[:6000] for key, value in settings.items()})

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def show(self, samples: Sequence[SampleRollout], *, step: int) -> None:
        columns = [list(column) for column in zip(*sample_rows(samples), strict=True)]
        self._mlflow.log_table(dict(zip(SAMPLE_COLUMNS, columns, strict=True)), "samples.json")

    def finish(self, results: Mapping[str, float], *, failed: bool) -> None:
        self._mlflow.log_metrics({f"result/{key}": value for key, value in results.items()})
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}
