"""`opsd export`: of a run that was stopped, as an adapter and merged, with a card that says what is known."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from run_support import make_run
from support import opsd
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opsd_cli.api.exporting import push_folder
from opsd_cli.cli import main
from opsd_cli.engine.export import add_end_ids
from opsd_cli.insight.history import read_history
from opsd_cli.insight.model_card import Written, find_control, model_card

HOSTILE = "x\n# Head [a](b) <script>|`\x1b[31m ---"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run in bfloat16 that was asked to stop in its third step of four."""
    folder = tmp_path_factory.mktemp("stopped")
    words = (
        "recipe=quickstart", "lora=r16", "model.dtype=bfloat16", "train.steps=4", "checkpoint.every=2",
        "eval.problems=4", "dataset.train_problems=64", "dataset.validation_problems=0", "dataset.test_problems=4",
        "dataset.retention_problems=4", "run.name=r",
    )  # fmt: skip
    ended = opsd("train", *words, cwd=folder, OPSD_FAULT="term@step.scored:3")
    assert ended.returncode == 143, ended.stderr
    return folder / "runs" / "r"


@pytest.mark.slow
def test_a_stopped_run_is_exported_as_an_adapter_and_merged(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(stopped), str(tmp_path / "adapter")]) == 0
    assert main(["export", str(stopped), str(tmp_path / "wide"), "--merge", "--dtype", "fp32"]) == 0
    assert main(["export", str(stopped), str(tmp_path / "half"), "--merge", "--dtype", "bf16", "--step", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / name) for name in ("adapter", "wide", "half")]
    assert "merged into bfloat16 weights, the model holds" in said.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    ids = tokenizer("12+30=", return_tensors="pt")
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)(**ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")(**ids).logits
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")(**ids).logits
    # The adapter is what was trained, in bfloat16; fp32 is the optimizer's own.
    torch.testing.assert_close(adapted, merged, rtol=0.05, atol=0.05)
    assert half.dtype is torch.bfloat16
    for name in ("adapter", "wide", "half"):
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == tokenizer.eos_token_id
        text = (tmp_path / name / "README.md").read_text()
        assert "The run was **stopped** when this was written" in text
        assert "after step 2 of 4" in text
        assert ModelCard(text).data.pipeline_tag == "text-generation"
    assert ModelCard((tmp_path / "adapter" / "README.md").read_text()).data.library_name == "peft"


@pytest.mark.slow
def test_what_cannot_be_exported_is_told_in_a_line(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*words: str) -> str:
        assert main(["export", *words]) in (2, 3)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if ": reading " not in line]
        return line

    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert "there exists and is never overwritten" in told(str(stopped), "there")
    assert "has no checkpoint of step 7; its checkpoints are of steps" in told(str(stopped), "out", "--step", "7")
    assert "--step first: give the number of a step, last or best" in told(str(stopped), "out", "--step", "first")
    assert "no run folder 'nope'" in told("nope", "out")
    assert "name a run and a folder to write" in told(str(stopped))
    assert "--public is for --push" in told(str(stopped), "out", "--public")
    assert "give OWNER/NAME" in told(str(stopped), "out", "--push", "a/b/c")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_cannot_be_uploaded_stays_on_the_disk(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["export", str(stopped), "out", "--push", "me/mine"]) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("opsd: me/mine was not uploaded (model me/mine: HF_HUB_OFFLINE is set")
    assert last.endswith("the model is in out: upload it later with `hf upload me/mine out`")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


class Uploads(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files uses."""

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, UploadServer)
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        base = f"http://127.0.0.1:{server.server_address[1]}/me/mine"
        if self.path == "/api/repos/create":
            server.created = json.loads(sent)
            answer: dict[str, object] = {"url": base, "id": "me/mine"}
        elif self.path.startswith("/api/models/me/mine/preupload/"):
            paths = [file["path"] for file in json.loads(sent)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif self.path.startswith("/api/models/me/mine/commit/"):
            lines = [json.loads(line) for line in sent.splitlines()]
            server.files |= {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
            answer = {"commitUrl": f"{base}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        else:
            assert self.path == "/api/validate-yaml", self.path
            answer = {"errors": [], "warnings": []}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


class UploadServer(ThreadingHTTPServer):
    created: dict[str, object]
    files: dict[str, dict[str, str]]


def test_a_folder_is_uploaded_whole_to_a_repository_that_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"config.json": "{}", "README.md": "---\nlicense: mit\n---\nA model.\n", "model.safetensors": "weights"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    server = UploadServer(("127.0.0.1", 0), Uploads)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    try:
        assert push_folder(tmp_path, "me/mine", private=True).endswith("/me/mine")
    finally:
        server.shutdown()
        server.server_close()
    assert (server.created["organization"], server.created["name"], server.created["visibility"]) == (
        "me",
        "mine",
        "private",
    )
    assert {name: base64.b64decode(file["content"]).decode() for name, file in server.files.items()} == texts


def test_a_generation_config_names_every_end_and_keeps_its_order(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    for before, after in ((None, [1, 7]), (1, [1, 7]), ([9, 1], [9, 1, 7]), ([7, 1], [7, 1])):
        file.write_text(json.dumps({"top_p": 0.9} | ({} if before is None else {"eos_token_id": before})))
        add_end_ids(file, (1, 7))
        assert json.loads(file.read_text()) == {"top_p": 0.9, "eos_token_id": after}


def written(step: int = 20) -> Written:
    return Written(step, "model", torch.float32, "", None, "opsd export runs/mine out")


def test_a_card_shows_results_with_intervals_and_the_control_arm(tmp_path: Path) -> None:
    mine = read_history(make_run(tmp_path, "mine", right=(10, 30)).path)
    assert "No control arm was found" in model_card(mine, written(), control=find_control(mine))
    make_run(tmp_path, "other_lr", right=(10, 12), changes={"context.control": "shuffled", "optim.lr": 0.5})
    assert find_control(mine) is None
    changes = {"context.control": "shuffled", "context.name": "shuffled"}
    make_run(tmp_path, "control", right=(10, 12), changes=changes)
    control = find_control(mine)
    assert control is not None
    assert control.name == "control"
    text = model_card(mine, written(), control=control)
    assert "| without the solution (how it is used) | 25.0 % [14.2, 40.2] | 75.0 % [59.8, 85.8] |" in text
    assert "| control arm, context=shuffled | 25.0 % [14.2, 40.2] | 30.0 % [18.1, 45.4] |" in text
    assert "Before and after, problem by problem: +50.0 points" in text
    assert "Against the control arm at its end: +45.0 points" in text
    assert "    opsd train recipe=quickstart\n    opsd export runs/mine out" in text
    data = ModelCard(text).data
    assert data.eval_results[0].metric_value == 0.75
    assert "**This is a control arm**" in model_card(control, written())


def test_a_card_of_a_step_that_was_not_measured_says_so(tmp_path: Path) -> None:
    mine = read_history(make_run(tmp_path, "mine").path)
    text = model_card(mine, written(step=7))
    assert "| 25.0 % [14.2, 40.2] | not measured |" in text
    assert "Accuracy was not measured at step 7." in text
    assert ModelCard(text).data.eval_results is None


def test_a_card_of_an_earlier_step_tells_no_results_of_the_end(tmp_path: Path) -> None:
    mine = read_history(make_run(tmp_path, "mine", right=(10, 30)).path)
    make_run(tmp_path, "control", right=(10, 12), changes={"context.control": "shuffled", "context.name": "shuffled"})
    text = model_card(mine, written(step=7), control=find_control(mine))
    assert "| control arm, context=shuffled | 25.0 % [14.2, 40.2] | not measured |" in text
    assert "Against the control arm" not in text
    assert "these weights saw the first 7 steps" in text


def test_a_strangers_names_and_warnings_are_shown_as_they_are(tmp_path: Path) -> None:
    changes = {
        "context.teacher": f"{HOSTILE}\n```\n",
        "dataset.name": "arithmetic",
        "model.path": f"/home/me/{HOSTILE}",
    }
    run = make_run(tmp_path, "mine", text=HOSTILE, changes=changes, argv=("opsd", "train", "x", "--key=hf_" + "a" * 34))
    text = model_card(read_history(run.path), written())
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["model-index"][0]["name"] == "mine"
    assert "\x1b" not in text
    assert "/home/me" not in text
    assert "hf_aaa" not in text
    assert not [line for line in body.splitlines() if line.startswith("# ") and line != "# mine"]
    assert "<script>" not in [line for line in body.splitlines() if not line.startswith("    ")]
