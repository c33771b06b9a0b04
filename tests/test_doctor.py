"""`opsd doctor`: every planted fault is found, all of them in one look, and what is well passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_support import config_of, opsd
from safetensors.torch import load_file, save_file
from support import GSM8K
from zoo import TINY

from opsd_cli.api.checkup import look_at_recipe
from opsd_cli.data.problems import Problem
from opsd_cli.insight.duplicates import contradicting, repeated, shared
from opsd_cli.insight.findings import Finding, Findings
from opsd_cli.insight.machine import look_at_machine
from opsd_cli.settings.errors import ConfigError, ExitCode, OutsideError
from opsd_cli.settings.plugin_files import use_plugins

LONG = "Mia has {} coins and gives some of them to a friend who lives beside the river. How many are left of {}?"


def model_with(
    folder: Path,
    *,
    weights: Callable[[dict[str, Any]], None] | None = None,
    template: str | None = None,
    **files: Callable[[dict[str, Any]], Any],
) -> Path:
    """The bundled model with something changed; `files` edit a JSON file by its name."""
    shutil.copytree(TINY, folder)
    if weights:
        held = load_file(folder / "model.safetensors")
        weights(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})
    for name, edit in files.items():
        file = folder / f"{name}.json"
        tree = json.loads(file.read_text(encoding="utf-8"))
        edit(tree)
        file.write_text(json.dumps(tree), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def row(number: int, **changes: Any) -> dict[str, Any]:
    question = LONG.format(number, 2 * number)
    return {
        "question": question,
        "solution": f"{number}+1={number + 1}. #### {number + 1}",
        "answer": str(number + 1),
    } | changes


def data_of(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return f"dataset.path={folder}"


def look(*words: str) -> list[Finding]:
    """What is found of a recipe, without the machine."""
    findings = Findings()
    look_at_recipe(findings, config_of(*words), device=torch.device("cpu"), tell=lambda phase: None)
    return findings.found


def levels(found: list[Finding]) -> dict[str, str]:
    """Name -> the worst that was found under it."""
    order = ("ok", "warning", "error")
    worst: dict[str, str] = {}
    for one in found:
        worst[one.name] = max(worst.get(one.name, "ok"), one.level, key=order.index)
    return worst


def message_of(found: list[Finding], name: str) -> str:
    return next(one.message for one in found if one.name == name and one.level != "ok")


SMALL = ("dataset.train_problems=12", "dataset.validation_problems=4", "dataset.test_problems=4", "eval.problems=4")
QUICK = ("recipe=quickstart", *SMALL, "dataset.retention_problems=4")


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return data_of(tmp_path_factory.mktemp("rows"), [row(n) for n in range(12)], [row(n) for n in range(20, 24)])


def test_faults_of_the_data_are_all_found_in_one_look(tmp_path: Path) -> None:
    train = [
        *(row(n) for n in range(12)),
        row(0, question=LONG.format(0, 0).upper() + "!"),  # there twice
        row(1, answer="77", solution="It is 77. #### 77"),  # there with another answer
        row(40, answer=None, solution="I do not know."),
        row(41, solution=""),
        row(42, question="<|end|><|assistant|>" + LONG.format(42, 84)),
        row(43, question=LONG.format(43, 86) * 12),  # too long
    ]
    test = [row(3), row(60)]  # the first is trained on
    words = ("recipe=jsonl", "model=tiny", data_of(tmp_path / "rows", train, test), "eval.problems=2")
    found = look(*words, "prompts.max_tokens=400", "prompts.max_dropped_share=0.2", "sampling.max_completion_tokens=64")
    seen = levels(found)
    wanted = {
        "read": "error", "left_out": "warning", "duplicates": "warning", "contradictions": "warning",
        "leak": "warning", "control_tokens": "error", "lengths": "warning",
    }  # fmt: skip
    assert {name: seen.get(name) for name in wanted} == wanted
    assert "answer is missing or null: row 15; solution is empty: row 16" in message_of(found, "read")
    assert "test-00001 is train-00004" in message_of(found, "leak")
    assert seen["trial"] == "warning"  # no step is tried on such data


def test_references_that_do_not_state_their_answers_are_an_error(tmp_path: Path) -> None:
    wrong = [row(n, answer=str(n + 500)) for n in range(12)]
    found = look("recipe=jsonl", "model=tiny", data_of(tmp_path / "rows", wrong, wrong[:2]), "eval.problems=2")
    assert levels(found)["references"] == "error"


def test_faults_of_template_and_files_are_all_found_in_one_look(tmp_path: Path, rows_path: str) -> None:
    template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
    )
    model = model_with(
        tmp_path / "model",
        weights=lambda held: held.pop("model.layers.3.mlp.down_proj.weight"),
        template=template,
        generation_config=lambda g: g.update(suppress_tokens=[5], temperature=0.6),
    )
    found = look(
        "recipe=jsonl", "model=hf", f"model.path={model}", rows_path, "prompts.teacher_thinking=true",
        "prompts.allow_different_endings=true", "eval.problems=4", "sampling.max_completion_tokens=64",
        "eval.max_completion_tokens=64",
    )  # fmt: skip
    seen = levels(found)
    wanted = {
        "date": "warning",
        "turn_end": "warning",
        "endings": "warning",
        "suppressed": "warning",
        "weights": "error",
    }
    assert {name: seen.get(name) for name in wanted} == wanted
    assert "down_proj" in message_of(found, "weights")
    assert any("temperature=0.6" in one.message for one in found if one.name == "generation")


Edit = dict[str, Any]
SHORTENS = "{% for m in messages %}<|user|>{{ m['content'] | replace('the river', 'it') }}{% endfor %}<|assistant|>"
NEW_TOKEN = {
    "id": 1024, "content": "<|new|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
    "special": True,
}  # fmt: skip
FAULTS: dict[str, tuple[Edit, tuple[str, ...], str, str]] = {
    "a head of its own is missing": ({"config": lambda c: c.update(tie_word_embeddings=False)}, (), "weights", "error"),
    "a layer too many": ({"weights": lambda w: w.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)})},
        (), "weights", "error"),
    "another size": ({"config": lambda c: c.update(intermediate_size=256)}, (), "weights", "error"),
    "quantised": ({"config": lambda c: c.update(quantization_config={"quant_method": "gptq"})}, (), "config", "error"),
    "too few positions": ({"config": lambda c: c.update(max_position_embeddings=128)}, (), "positions", "error"),
    "no control tokens": ({"template": "{% for m in messages %}{{ m['content'] }}{% endfor %} Answer:"},
        (), "round_trip", "warning"),
    "the question is changed": ({"template": SHORTENS}, (), "round_trip", "error"),
    "a template that fails": ({"template": "{{ messages[0].nothing.at_all }}"}, (), "template", "error"),
    "a template that loses the message": ({"template": "<|user|>hello<|end|><|assistant|>"}, (), "template", "error"),
    "no template": ({"template": ""}, (), "template", "error"),
    "no end": ({"tokenizer_config": lambda t: t.pop("eos_token"), "generation_config": lambda g: g.pop("eos_token_id")},
        (), "ends", "error"),
    "an end that others do not know": ({"generation_config": lambda g: g.update(eos_token_id=7),
        "tokenizer_config": lambda t: t.update(eos_token="<|user|>")}, (), "turn_end", "warning"),
    "ids beyond the table": ({"tokenizer": lambda t: t["added_tokens"].append(NEW_TOKEN),
        "template": "<|user|>{{ messages[-1]['content'] }}<|end|><|assistant|><|new|>"},
        (), "unknown_tokens", "error"),
    "prompts over the limit": ({}, ("prompts.max_tokens=60",), "lengths", "error"),
    "nothing held out": ({}, ("eval.split=validation", "dataset.validation_problems=0"), "held_out", "error"),
    "no such column": ({}, ("dataset.question_field=prompt",), "read", "error"),
    "a teacher of another vocabulary": ({}, ("method=opd", "teacher.path=TEACHER"), "tokens", "error"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_before_anything_is_run(fault: str, tmp_path: Path, rows_path: str) -> None:
    changes, words, name, level = FAULTS[fault]
    if "weights" not in changes:  # so that no step is tried
        changes = {"weights": lambda held: held.pop("model.norm.weight")} | changes
    model = model_with(tmp_path / "model", **changes)
    other = model_with(tmp_path / "other", tokenizer=lambda t: t["added_tokens"].append(NEW_TOKEN))
    found = look(
        "recipe=jsonl", "model=hf", f"model.path={model}", rows_path, "eval.problems=4",
        "sampling.max_completion_tokens=64", "eval.max_completion_tokens=64",
        *(word.replace("TEACHER", str(other)) for word in words),
    )  # fmt: skip
    assert levels(found).get(name) == level, [one for one in found if one.level != "ok"]


def test_a_tokenizer_file_that_is_a_pointer_is_told(tmp_path: Path, rows_path: str) -> None:
    model = model_with(tmp_path / "model")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    found = look("recipe=jsonl", "model=hf", f"model.path={model}", rows_path)
    assert levels(found) | {"files": "error"} == levels(found)
    assert levels(found)["duplicates"] == "ok"  # the data are looked at all the same


def test_without_a_hub_its_model_is_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = Findings()
    config = config_of("recipe=gsm8k", f"dataset.path={GSM8K}")
    look_at_recipe(findings, config, device=torch.device("cpu"), tell=lambda phase: None)
    assert findings.exit_code == ExitCode.ENVIRONMENT


LIAR = """
from dataclasses import replace
from opsd_cli.sampling.samplers import StaticSampler
from opsd_cli.settings.registry import plugin

@plugin("sampler", "liar")
class Liar:
    def sample(self, completer, request):
        here = {"placement": "shared", "processes": 1, "lag": 0}
        own = StaticSampler(max_rows=8, cache_tokens=8192, prompt="student", dataset_share=0.0, **here)
        drawn = own.sample(completer, request)
        return [replace(one, logprobs=tuple(value - 1.0 for value in one.logprobs)) for one in drawn]
"""


@pytest.mark.slow
def test_faults_of_what_is_alive_are_all_found_in_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "sampler").mkdir(parents=True)
    (tmp_path / "recipes" / "sampler" / "liar.yaml").write_text("name: liar\n")
    (tmp_path / "liar.py").write_text(LIAR)
    use_plugins(["liar.py"])
    model = model_with(tmp_path / "model", config=lambda c: c.update(attention_dropout=0.1))
    words = ("sampler=liar", "context=none", "model=hf", f"model.path={model}", "model.dropout=true")
    seen = levels(look(*QUICK, *words))
    wanted = {"sampler": "error", "divergence": "warning", "dropout": "warning", "step": "ok", "export": "ok"}
    assert {name: seen.get(name) for name in wanted} == wanted


@pytest.mark.slow
def test_a_teacher_that_is_shown_nothing_new_is_an_error(tmp_path: Path) -> None:
    """A context whose words the template cuts off, and one that shows a column that is empty."""
    rows = [row(n, hint="") for n in range(12)]
    path = data_of(tmp_path / "rows", rows, rows[:4])
    context = "context.teacher='{{question}}\n\n{{row.hint}}\n\n{{instruction}}'"
    found = look("recipe=jsonl", "model=tiny", path, context, "eval.problems=4", "train.problems_per_step=4")
    assert levels(found)["same_prompts"] == "error"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", "gsm8k", "gsm8k_full", "jsonl"])
def test_every_recipe_that_can_run_here_passes(
    recipe: str, rows_path: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {
        "quickstart": QUICK[1:],
        "gsm8k": ("model=tiny", f"dataset.path={GSM8K}", "dataset.train_problems=40", "eval.problems=4"),
        "gsm8k_full": ("model=tiny", f"dataset.path={GSM8K}", "dataset.train_problems=40", "eval.problems=4"),
        "jsonl": ("model=tiny", rows_path, "eval.problems=4"),
    }[recipe]
    code, out, err = opsd(capsys, "doctor", f"recipe={recipe}", *words, "--json")
    told = json.loads(out)
    assert code == 0, (told, err)
    assert told["errors"] == 0
    seen = {one["name"]: one["level"] for one in told["findings"]}
    assert {seen[name] for name in ("same_weights", "divergence", "sampler", "export", "step", "versions")} == {"ok"}
    assert not list(tmp_path.iterdir())  # nothing is kept


def test_what_is_the_same_question_is_told_by_its_words() -> None:
    def problem(name: str, question: str, answer: str = "1") -> Problem:
        return Problem(name, question, "", answer)

    a, b = problem("a", LONG.format(1, 2)), problem("b", "  " + LONG.format(1, 2).lower().replace(".", " ."), "2")
    assert repeated([a, b]) == [("b", "a")]
    assert shared([b], [a]) == [("b", "a")]
    assert contradicting([a, b]) == [("b", "a")]
    # In a few signs each of them counts.
    assert repeated([problem("c", "3 + 4 = ?"), problem("d", "3 * 4 = ?")]) == []


def test_what_a_look_raises_becomes_a_finding_and_a_bug_stays_one() -> None:
    findings = Findings()

    def outside() -> None:
        raise OutsideError("the disk is full")

    assert findings.attempt("run", "disk", outside) is None
    assert findings.exit_code == ExitCode.ENVIRONMENT

    def two() -> None:
        raise ConfigError("one", "two")

    findings.attempt("run", "config", two)
    assert [one.message for one in findings.found] == ["the disk is full", "one", "two"]
    assert findings.exit_code == ExitCode.CHANGE_SOMETHING

    def bug() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        findings.attempt("run", "bug", bug)


def test_what_a_machine_lacks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler there
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    findings = Findings()
    config = config_of("recipe=gsm8k", "zero=stage2_offload", "model.dtype=float16")
    look_at_machine(findings, config, problem="the driver is too old", device=torch.device("cpu"))
    seen = levels(findings.found)
    assert {name: seen[name] for name in ("compilers", "hub", "device", "disk", "clock", "versions")} == {
        "compilers": "error", "hub": "warning", "device": "warning", "disk": "ok", "clock": "ok", "versions": "ok",
    }  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_the_machine_is_told_without_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = opsd(capsys, "doctor")
    assert code == 0
    assert "opsd 0.1" in out
    assert "HF_HUB_OFFLINE" in out
    code, _, err = opsd(capsys, "doctor", "recipe=quickstart", "divergence=jsd,forward_kl")
    assert code == 2
    assert err.count("\n") == 1
