"""A hub that refuses, fails, cannot be reached or is not asked: one line each, and cached copies are used."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from dataset_support import gsm8k, hub_dataset, message
from recipe_support import config_of
from support import REPOSITORY, TESTS, opsd, run_ranks

from opsd_cli.data import hub
from opsd_cli.engine import base, model_limits
from opsd_cli.engine.loading import Source, resolve
from opsd_cli.engine.process_group import Ranks, alone
from opsd_cli.rank import build
from opsd_cli.settings.errors import DataError, OutsideError
from opsd_cli.settings.typed_config import plain_tree

TINY = REPOSITORY / "opsd_cli" / "assets" / "tiny"


class HubStub(BaseHTTPRequestHandler):
    """Answers every request with the status of the server, and counts those for a model or a dataset: once a day
    huggingface_hub also asks which programs run it."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, StubServer)
        server.requests += self.path != "/api/agent-harnesses"
        body = b"{}"
        self.send_response(server.status)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


class StubServer(ThreadingHTTPServer):
    status = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    requests = 0


@pytest.fixture
def hub_stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubServer]:
    """A hub of our own on this machine, no cached copies, and no waiting between tries."""
    import datasets

    server = StubServer(("127.0.0.1", 0), HubStub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "RETRY_SECONDS", (1, 1))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "no such name on the hub, or no access to it; check the spelling"),
        (401, {}, "run `hf auth login`"),
        (403, {"X-Error-Code": "GatedRepo"}, "access is gated"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision"),
    ],
)
def test_a_name_the_hub_refuses_is_one_line_at_once(
    hub_stub: StubServer, status: int, headers: dict[str, str], said: str
) -> None:
    hub_stub.status, hub_stub.headers = status, headers
    assert said in message(hub_dataset(path="openai/gsmk8"))
    assert hub_stub.requests == 1


@pytest.mark.parametrize(("status", "said"), [(503, "the hub fails (HTTP 503)"), (429, "too many requests")])
def test_a_hub_that_fails_is_tried_again_visibly_and_then_an_outside_error(
    hub_stub: StubServer, capsys: pytest.CaptureFixture[str], status: int, said: str
) -> None:
    hub_stub.status = status
    with pytest.raises(OutsideError) as caught:
        gsm8k(path=None).load()
    told = capsys.readouterr().err
    assert hub_stub.requests == 3
    assert told.count("trying again in 1 s") == 2
    assert said in told
    assert "looking for a cached copy" in told
    text = str(caught.value)
    assert "openai/gsm8k" in text
    assert "no cached copy" in text
    assert "\n" not in text
    assert "`dataset.path=FOLDER model=tiny`" in text
    assert "`recipe=quickstart`" in text


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch, hub_stub: StubServer) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    told: list[str] = []
    assert hub.look_up("model", "Qwen/Qwen3-1.7B", revision=None, tell=told.append) is None
    assert told[-1] == "model Qwen/Qwen3-1.7B: the hub cannot be reached; looking for a cached copy"


def test_offline_mode_asks_nobody_and_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, hub_stub: StubServer
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OutsideError, match="HF_HUB_OFFLINE is set, and there is no cached copy"):
        gsm8k(path=None).load()
    assert hub_stub.requests == 0


def test_a_cached_copy_is_used_and_named(monkeypatch: pytest.MonkeyPatch, hub_stub: StubServer, tmp_path: Path) -> None:
    cache_dataset(tmp_path / "cache", {"question": ["q1", "q2"], "answer": ["x\n#### 1", "y\n#### 2"]})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    splits = hub_dataset().load()
    assert splits.source.startswith("openai/gsm8k (main), the cached copy (the hub was not reached)")
    assert [problem.answer for problem in (*splits.train, *splits.validation, *splits.test)] == ["1", "2", "1", "2"]
    assert "no column 'qestion' - did you mean 'question'?" in message(hub_dataset(question_field="qestion"))
    assert "tran" in message(hub_dataset(train_split="tran"))


def test_a_model_that_the_hub_refuses_is_one_line(hub_stub: StubServer) -> None:
    hub_stub.status, hub_stub.headers = 404, {"X-Error-Code": "RepoNotFound"}
    with pytest.raises(
        DataError, match=r"^model Qwen/Qwen3-1\.7: no such name on the hub, or no access to it"
    ) as caught:
        resolve("Qwen/Qwen3-1.7", None, key="model.path")
    assert "\n" not in str(caught.value)
    assert hub_stub.requests == 1


FEW = (
    "dataset.train_problems=8", "dataset.validation_problems=0", "dataset.test_problems=8",
    "dataset.retention_problems=0",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_with_a_failing_hub_counts_down_and_takes_the_cached_model(hub_stub: StubServer, tmp_path: Path) -> None:
    hub_stub.status = 503
    cache_model(tmp_path)
    done = opsd(
        *("train", "recipe=quickstart", "model=hf", "model.path=acme/tiny", *FEW, "--dry-run"),
        cwd=tmp_path, cold=True,
        HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=os.environ["HF_ENDPOINT"], HF_HUB_OFFLINE="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for seconds in (2, 1, 4, 3):
        assert f"the hub fails (HTTP 503); trying again in {seconds} s" in done.stderr
    assert "model acme/tiny: the hub fails (HTTP 503); looking for a cached copy" in done.stderr
    assert "student prompt of" in done.stdout


@pytest.mark.slow
def test_the_hub_is_asked_by_one_rank_of_a_machine(hub_stub: StubServer, tmp_path: Path) -> None:
    hub_stub.status = 503
    cache_model(tmp_path)
    words = ("recipe=quickstart", "model=hf", "model.path=acme/tiny", *FEW, "eval.problems=0")
    (tmp_path / "cases.json").write_text(json.dumps({"read": plain_tree(config_of(*words))}))
    run_ranks(
        [TESTS / "rendering_ranks.py", tmp_path / "cases.json"], 3,
        HF_HUB_CACHE=str(tmp_path / "hf" / "hub"), HF_ENDPOINT=os.environ["HF_ENDPOINT"], HF_HUB_OFFLINE="0",
    )  # fmt: skip
    (read,) = {(tmp_path / f"result_{rank}.json").read_text() for rank in range(3)}
    assert "prompts" in read
    assert hub_stub.requests == 3, "the tries of one rank"


def cache_model(folder: Path) -> None:
    """What huggingface_hub leaves in its cache under hf/ after loading acme/tiny."""
    commit = "0123456789abcdef" * 2 + "01234567"
    model = folder / "hf" / "hub" / "models--acme--tiny"
    shutil.copytree(TINY, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)


def cache_dataset(folder: Path, columns: dict[str, list[str]]) -> None:
    """What the datasets library leaves in its cache after loading openai/gsm8k."""
    from datasets import DatasetInfo, Features, Value
    from datasets.arrow_writer import ArrowWriter

    here = folder / "openai___gsm8k" / "main" / "0.0.0" / "0123abcd"
    here.mkdir(parents=True)
    features = Features({name: Value("string") for name in columns})
    splits = {}
    for split in ("train", "test"):
        writer = ArrowWriter(path=str(here / f"gsm8k-{split}.arrow"), features=features)
        for row in zip(*columns.values(), strict=True):
            writer.write(dict(zip(columns, row, strict=True)))
        examples, size = writer.finalize()
        splits[split] = {"name": split, "num_bytes": size, "num_examples": examples, "dataset_name": "gsm8k"}
    info = DatasetInfo(
        features=features, builder_name="parquet", dataset_name="gsm8k", config_name="main", version="0.0.0"
    )
    info.splits = splits
    info.write_to_directory(str(here))


def test_errors_that_have_nothing_to_do_with_the_hub_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), hub.hub_errors("model x/y"):
        _ = 1 / 0


def test_a_hub_error_is_found_below_the_one_that_a_library_made_of_it(hub_stub: StubServer) -> None:
    hub_stub.status, hub_stub.headers = 404, {"X-Error-Code": "RepoNotFound"}
    with pytest.raises(DataError, match=r"^model x/y: no such name on the hub"), hub.hub_errors("model x/y"):
        _fail_as_transformers_does(hub_stub)


def _fail_as_transformers_does(server: StubServer) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi(endpoint=f"http://127.0.0.1:{server.server_address[1]}").model_info("x/y")
    except OSError as error:
        raise OSError("x/y is not a local folder\nand 80 more lines") from error


class SecondOfANode(Ranks):
    """A rank for itself that stands for the second one of a machine."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), nullcontext, rank=0, world_size=1)

    def in_turn(self, first, others):
        return others()


OTHER = Source(str(TINY), None, torch.float32, "sdpa", False, cached_only=False)


@pytest.mark.parametrize(("ranks", "asks"), [(alone, True), (SecondOfANode, False)])
def test_weights_too_are_asked_for_by_one_rank_of_a_machine(ranks, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    for module, name in ((build, "load_causal"), (base, "load_model"), (model_limits, "load_tokenizer")):
        own = getattr(module, name)

        def noted(source, *given, own=own, **more):
            asked.append(not source.cached_only)
            return own(source, *given, **more)

        monkeypatch.setattr(module, name, noted)
    build.build_policy(config_of("recipe=quickstart"), OTHER, torch.device("cpu"), ranks())
    assert asked == [asks]
    base.load_frozen(OTHER, replace(OTHER, cached_only=True), ranks(), device=torch.device("cpu"))
    assert asked == [asks, asks, False, asks]
