"""A poor environment: no home, no compiler, no colours, a small terminal, ASCII, a full disk, odd paths; a real run in
all of them at once, and what is said where it cannot work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import REPOSITORY

from opsd_cli.engine.loading import find_source, load_causal
from opsd_cli.settings.config import ModelSettings
from opsd_cli.settings.errors import DataError

pytestmark = pytest.mark.slow

POOR = {
    "PATH": "/nonexistent",  # no compiler, no ninja, no hostname
    "TMPDIR": "/nonexistent",
    "LANG": "C",
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",  # what LANG=C meant before Python took it for UTF-8
    "TERM": "dumb",
    "NO_COLOR": "1",
    "COLUMNS": "40",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
}
TINY = REPOSITORY / "opsd_cli" / "assets" / "tiny"


def opsd(*words: str, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in the poor environment and nothing else; `before` is a shell command that limits it further."""
    line = shlex.join([sys.executable, "-m", "opsd_cli", *words])
    command = ["/bin/bash", "-c", f"{before or ':'}; exec {line}"]
    return subprocess.run(command, cwd=cwd, env=POOR, capture_output=True, text=True, timeout=240, check=False)


def test_a_run_in_a_poor_environment_works_and_a_changed_row_ends_its_continuation(tmp_path: Path) -> None:
    here = tmp_path / "süß & schön $HOME 日本"
    here.mkdir()
    rows = [{"question": f"What is {n} + 1?", "solution": f"#### {n + 1}", "answer": n + 1} for n in range(12)]
    data = here / "rows of mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "recipe=jsonl",
        f"dataset.path='{data.name}'",
        "model=tiny",
        "optim=adamw_tiny",
        "lora=none",
        "train.steps=1",
    ]
    done = opsd("train", *words, "run.name=one", "optim.schedule=constant", cwd=here)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.isascii()
    assert done.stdout.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stderr + done.stdout)
    assert "accuracy" in done.stdout
    assert (here / "runs" / "one" / "model" / "model.safetensors").is_file()
    data.write_text(data.read_text().replace("What is 3", "What is 03"))
    changed = opsd("train", "--resume", "runs/one", "train.steps=2", cwd=here)
    assert changed.returncode == 2
    last = changed.stderr.strip().splitlines()[-1]
    assert re.search(
        r"the dataset has changed since .*fingerprint [0-9a-f]{12}, now [0-9a-f]{12}.*start a new run", last
    )


@pytest.mark.parametrize(
    "words", [("train", "recipe=quickstart", "--dry-run"), ("train", "-m", "recipe=quickstart", "run.seed=1,2")]
)
def test_no_place_to_write_is_one_line_and_exit_code_3(tmp_path: Path, words: tuple[str, ...]) -> None:
    full = opsd(*words, cwd=tmp_path, before="ulimit -f 0")
    assert full.returncode == 3, full.stderr
    assert "Traceback" not in full.stderr
    assert "choose another place" in full.stderr


def test_a_model_that_comes_with_code_is_refused_and_the_switch_named(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(TINY, folder)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    settings = ModelSettings(
        path=str(folder), revision=None, dtype="float32", attention="sdpa", trust_remote_code=False,
        chat_template=None, max_completion_tokens=None, teacher=None, quantize="none",
        dropout=False, export_dtype="auto", checkpoint=None,
    )  # fmt: skip
    source = find_source(settings, dtype=torch.float32)
    with pytest.raises(DataError, match=r"model\.revision=COMMIT and type model\.trust_remote_code=true") as caught:
        load_causal(source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()
