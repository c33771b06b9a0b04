"""Run by test_resume: one small run, and copies of it that were tampered with and are continued. Prints a JSON line for
each: exit code, the error, the warnings of the continued attempt."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from crash.runs import attempt, differences, make_run, preload

from opsd_cli.engine.atomic_files import describe_file
from opsd_cli.launch.start import seconds_of_steps
from opsd_cli.run.events import read_events
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.rank_errors import read_error

WRITE = "{{question}}\n\nAn attempt of yours:\n{{attempt}}\n\nSay what to do differently."
TEACHER = "{{question}}\n\nA note of yours:\n{{written}}\n\n{{instruction}}"


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def newest(run: RunFolder) -> Path:
    return run.checkpoints / (run.checkpoints / "latest").read_text().strip()


def seal(checkpoint: Path) -> None:
    """Make the manifest fit the files again, as somebody who doctors a checkpoint would."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {name: describe_file(checkpoint / name) for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def nothing(run: RunFolder) -> None:
    return None


def doctored(run: RunFolder) -> None:
    (shard,) = newest(run).rglob("weights_00000.safetensors")
    torch.save({"extra": Attack(run.path / "canary")}, shard, pickle_module=pickle)
    seal(newest(run))


def of_an_older_schema(run: RunFolder) -> None:
    file = newest(run) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 1}))


def other_settings(run: RunFolder) -> None:
    text = run.config.read_text()
    run.config.write_text(text.replace("lr: 0.001", "lr: 0.5").replace("every: 1", "every: 2"))
    assert run.config.read_text() != text


def of_an_earlier_opsd(run: RunFolder) -> None:
    """Other versions, a fingerprint made of sums, no count of updates; and the pointer to the checkpoint is gone."""
    file = newest(run) / "state.json"
    state = json.loads(file.read_text())
    state["versions"]["torch"] = "1.0.0"
    state["model_fingerprint"] = "0" * 64
    del state["updates"]
    file.write_text(json.dumps(state))
    seal(newest(run))
    (run.checkpoints / "latest").unlink()


def other_weights(run: RunFolder) -> None:
    file = newest(run) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_fingerprint": "bytes:" + "0" * 64}))
    seal(newest(run))


def its_seconds_nearly_used(run: RunFolder) -> None:
    """A budget that the steps before the stop have used but for a moment: one more step fits."""
    used = json.loads((newest(run) / "state.json").read_text())["seconds"]
    tree = yaml.safe_load(run.config.read_text())
    tree["train"]["seconds"] = used + 1e-6
    run.config.write_text(yaml.safe_dump(tree))


def no_checkpoints(run: RunFolder) -> None:
    shutil.rmtree(run.checkpoints)


CASES: list[Callable[[RunFolder], None]] = [
    nothing,
    doctored,
    other_settings,
    of_an_earlier_opsd,
    other_weights,
    its_seconds_nearly_used,
    no_checkpoints,
]


def several_updates(root: Path) -> dict[str, object]:
    """Two updates a step, a teacher that is renewed after every third, which is not at the end of a step, and a context
    that the policy writes in the step; stopped between the two updates of step 2 and continued, against the same run
    without a stop."""
    whole, cut = (make_run(root / name, 4) for name in ("whole", "cut"))
    for run in (whole, cut):
        tree = yaml.safe_load(run.config.read_text())
        tree["train"]["updates_per_step"], tree["loss"]["importance_cap"] = 2, 2.0
        tree["teacher"] = {"name": "sync", "every": 3}
        tree["context"] |= {"name": "reflection", "write": WRITE, "write_tokens": 8, "teacher": TEACHER}
        tree["checkpoint"]["every"], tree["eval"]["problems"] = 4, 0
        run.config.write_text(yaml.safe_dump(tree))
    codes = attempt(whole)
    codes += attempt(cut, "term@step.teacher_moved:3")
    saved = newest(cut).name
    codes += attempt(cut)
    found = differences(whole, cut, stopped=True)
    steps = [event["metrics"] for event in read_events(cut.events) if event["kind"] == "step"]
    written = [metrics["rollout/written_tokens"] for metrics in steps]
    return {"case": "several_updates", "codes": codes, "saved": saved, "differences": found, "written": written}


def main(root: Path) -> None:
    preload()
    print(json.dumps(several_updates(root)), flush=True)
    stopped = make_run(root / "run", 4)
    assert attempt(stopped, "term@step.scored:7") == [143]
    print(json.dumps({"case": "stopped", "step": int(newest(stopped).name.removeprefix("step_"))}), flush=True)
    for case in CASES:
        run = RunFolder(root / case.__name__)
        shutil.copytree(stopped.path, run.path)
        case(run)
        (code,) = attempt(run)
        error = read_error(run, 0)
        said = [event["message"] for event in read_events(run.events) if event["kind"] == "warning"]
        steps = [event["step"] for event in read_events(run.events) if event["kind"] == "step"]
        made = {"case": case.__name__, "code": code, "error": error.message if error else "", "steps": steps}
        saved = json.loads((newest(run) / "state.json").read_text())
        made |= {"used": seconds_of_steps(run), "saved_seconds": saved["seconds"]}
        print(json.dumps(made | {"warnings": said, "canary": (run.path / "canary").exists()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
