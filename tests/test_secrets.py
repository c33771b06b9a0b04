"""Secrets: refused in settings, and taken out of everything that a run writes or shows."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from launcher_support import config_in, on_cpu
from recipe_support import opsd, problems_of, write_recipe

from opsd_cli.launch import launchers
from opsd_cli.launch.start import start_run
from opsd_cli.run.folder import new_run_folder, read_command, write_command
from opsd_cli.safety.secrets import REDACTED, RedactingStream, holds_secret, redact
from opsd_cli.ui.display import open_display

CANARY = "hf_canary" + "Q7" * 14
API_KEY = "canary of no known form, 0123"

TOKENS = [
    "hf_" + "aB3" * 11,
    "sk-proj-" + "a1" * 20,
    "sk-ant-api03-" + "a1" * 20,
    "ghp_" + "a1" * 18,
    "github_pat_" + "a1" * 20,
    "glpat-" + "a1" * 10,
    "AKIA" + "A1B2" * 4,
    "xoxb-1234567890-abc",
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    "WANDB_API_KEY=" + "0a" * 20,
]
PLAIN = [
    "0a" * 20,
    "revision=" + "0a" * 20,
    "Qwen/Qwen3-0.6B",
    "task-force",
    "sk-learn",
    "hf_model",
    "risk-assessment-of-a-model",
]


@pytest.mark.parametrize("token", TOKENS)
def test_a_secret_is_refused_in_settings_and_not_repeated(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = opsd(
        capsys, "train", "recipe=quickstart", f"launcher.runner_args='{token}'", f"prompts.system='{token}'"
    )
    assert code == 2
    assert "a value looks like a secret, and no setting needs one: use `hf auth login`" in err
    assert token.rpartition("=")[2] not in out + err
    write_recipe(Path("recipes"), "recipe/mine", f"# x\nprompts:\n  system: '{token}'\n")
    assert problems_of("recipe=quickstart")[0].startswith("recipes/recipe/mine.yaml:3: a value looks like a secret")


@pytest.mark.parametrize("text", PLAIN)
def test_a_commit_and_a_name_are_no_secrets(text: str) -> None:
    assert not holds_secret(text)


def test_what_the_environment_calls_a_secret_is_one_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", API_KEY)
    monkeypatch.setenv("SHORT_TOKEN", "steps")
    monkeypatch.setenv("MONKEY", "bananas and more bananas")
    assert redact(f"steps, {API_KEY}! bananas and more bananas") == f"steps, {REDACTED}! bananas and more bananas"


def test_a_command_is_recorded_without_secrets(tmp_path: Path) -> None:
    folder = new_run_folder(tmp_path, name="a", hint="x")
    write_command(folder, argv=["opsd", "train", f"launcher.runner_args=--export=WANDB_API_KEY={'0a' * 20}", CANARY])
    assert read_command(folder)["argv"][2:] == [f"launcher.runner_args=--export=WANDB_API_KEY={REDACTED}", REDACTED]


def test_a_stream_is_redacted_line_by_line_and_is_a_stream_otherwise() -> None:
    inner = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream = RedactingStream(inner)
    print("token:", CANARY[:9], end="", file=stream)
    stream.write(CANARY[9:] + "\nand")
    stream.writelines([" so ", f"on {CANARY}"])
    stream.buffer.write(b"")
    assert (stream.encoding, stream.closed, stream.isatty(), stream.writable()) == ("utf-8", False, False, True)
    stream.flush()
    inner.seek(0)
    assert inner.read() == f"token: {REDACTED}\nand so on {REDACTED}"


LEAKING_WORKER = """
import logging, os, sys
from opsd_cli.rank import entry
from opsd_cli.run.events import EVENTS, JsonLines
from opsd_cli.run.summary import write_summary

log = logging.getLogger("a library")
log.addHandler(logging.StreamHandler(sys.stdout))  # before the worker's main, as libraries do

def leak(rank):
    token = os.environ["HF_TOKEN"] + " " + os.environ["WANDB_API_KEY"]
    print("stdout", token, flush=True)
    print("stderr " + token, end="", file=sys.stderr)
    log.warning("log %s", token)
    rank.report_phase("phase " + token)
    facts = dict.fromkeys(EVENTS["run_started"], 0) | {"task": "train", "plan": [token]}
    rank.recorder.write("run_started", **facts)
    rank.warn("warning " + token)
    JsonLines(rank.folder.samples).append({"completion": token, "more": [{"deep": token}]})
    write_summary(rank.folder, peak_gib=0.0)
    raise RuntimeError("crash with " + token)

entry.TASKS["train"] = leak
raise SystemExit(entry.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_canary_in_the_environment_never_reaches_the_run_folder_or_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "leaking_worker.py"
    script.write_text(LEAKING_WORKER)
    monkeypatch.setattr(launchers, "WORKER", (str(script),))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    argv = ["opsd", "train", CANARY, API_KEY]
    code = start_run(
        on_cpu(config_in(tmp_path / "runs", name="a")), task="train", argv=argv, hint="x", open_display=open_display
    )
    out, err = capfd.readouterr()
    assert code == 1
    found = {path.name: path.read_bytes().decode() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert {"config.yaml", "events.jsonl", "samples.jsonl", "summary.json", "crash.txt", "rank_0.log"} <= found.keys()
    for name, text in {**found, "terminal": out + err}.items():
        assert CANARY not in text, name
        assert API_KEY not in text, name
    for name in ("events.jsonl", "samples.jsonl", "crash.txt", "rank_0.log", "rank_0.error", "command.json"):
        assert REDACTED in found[name], name
    assert f"crash with {REDACTED} {REDACTED}" in err
    assert f"log {REDACTED}" in found["rank_0.log"]
    assert json.loads(found["summary.json"])["command"][2:] == [REDACTED, REDACTED]
    assert os.environ["HF_TOKEN"] == CANARY
