"""The files for Kubernetes and SkyPilot in docs/examples: YAML with the fields that a run on a cluster needs, whose
commands start a run, continue one, and leave one alone that is complete."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_support import problems_of

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
FILES = ("kubernetes-job.yaml", "kubernetes-jobset.yaml", "skypilot.yaml")
SHOW = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@"\n'


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def pod_of(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    job = spec if name == "kubernetes-job.yaml" else spec["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]


def command_of(name: str) -> str:
    if name == "skypilot.yaml":
        return read(name)["run"]
    (container,) = pod_of(name)["containers"]
    assert container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    return script


def words_of(name: str, tmp_path: Path, *there: str) -> list[str]:
    """What the file's command starts, where the files `there` are in the run folder."""
    tools, run = tmp_path / "bin", tmp_path / "runs" / "mine"
    for folder in (tools, run):
        folder.mkdir(parents=True)
    for tool in ("opsd", "torchrun"):
        (tools / tool).write_text(SHOW)
        (tools / tool).chmod(0o755)
    for file in there:
        (run / file).touch()
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", "RUN": str(run), "MACHINES": "2", "MASTER": "first"}
    environ |= {"JOB_COMPLETION_INDEX": "1", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "first\nsecond"}
    environ |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    done = subprocess.run(["bash", "-euc", command_of(name)], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", FILES)
def test_the_first_time_a_run_is_started_and_its_settings_compose(name: str, tmp_path: Path) -> None:
    words = words_of(name, tmp_path)
    settings = words[words.index("train") + 1 :]
    assert problems_of(*settings) == ()
    assert "run.name=mine" in settings
    if words[0] == "torchrun":
        assert {"--nnodes=2", "--node-rank=1", "--master-addr=first", "--no-python"} <= set(words)
        assert "launcher=env" in settings


@pytest.mark.parametrize("name", FILES)
def test_a_run_that_is_there_is_continued_and_a_complete_one_left_alone(name: str, tmp_path: Path) -> None:
    words = words_of(name, tmp_path / "a", "config.yaml")
    assert words[words.index("train") + 1 :] == ["--resume", str(tmp_path / "a" / "runs" / "mine")]
    assert words_of(name, tmp_path / "b", "config.yaml", "summary.json") == []


@pytest.mark.parametrize("name", FILES[:2])
def test_a_pod_has_time_to_save_memory_for_nccl_and_a_place_for_its_runs(name: str) -> None:
    pod = pod_of(name)
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 1800, "launcher.save_seconds"
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/runs", "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_a_job_ends_at_the_exit_codes_that_another_try_cannot_help() -> None:
    rules = read("kubernetes-job.yaml")["spec"]["podFailurePolicy"]["rules"]
    (codes,) = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"]
    assert codes == [1, 2, 4], "3, 130 and 143 are worth another try"
