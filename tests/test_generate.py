"""`opsd generate`: one prompt, a file, a pipe, a chat; what a model writes is shown as it is."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from opsd_cli.cli import main
from opsd_cli.commands.generate import _is_setting

QUESTION = "Ana has 12 keys. Ana buys 5 more. How many keys does Ana have now?"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_prompt_is_answered_as_evaluation_would(capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled model, asked as the quickstart's student: by transformers, and in a batch by opsd's own pass."""
    assert main(["generate", "tiny", "recipe=quickstart", QUESTION]) == 0
    streamed = capsys.readouterr().out.rstrip("\n")
    assert "####" in streamed
    rows = [{"question": QUESTION, "solution": "12+5=17", "answer": "17"}, {"prompt": "2 keys and 3 keys?"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert main(["generate", "tiny", "recipe=quickstart", "--file", "p.jsonl"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], first["completion"], first["finish_reason"]) == (QUESTION, streamed, "stop")
    assert second["prompt"] == "2 keys and 3 keys?"


def test_a_teacher_sees_the_solution_and_a_prompt_may_come_from_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    words = ("--as", "teacher", "--solution", "First 12+5=17. #### 17", "--answer", "17", "--json")
    assert main(["generate", "tiny", "recipe=quickstart", *words]) == 0
    assert "17" in json.loads(capsys.readouterr().out)["completion"]


def test_a_chat_remembers_forgets_and_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("\n3+4=\n/new\n/quit\n"))
    assert main(["generate", "tiny", "--max-tokens", "5"]) == 0
    said = capsys.readouterr()
    assert said.out.count("you> ") == 4
    assert "Ctrl-D ends" in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "name a model or a run first"),
        (("tiny", "a", "b"), "2 prompts: quote one"),
        (("tiny", "--chat", "x"), "--chat asks you for the words"),
        (("tiny", "--chat", "--json"), "--chat takes no --file and no --json"),
        (("tiny", "--temperature", "-1", "x"), "--temperature -1: must be at least 0"),
        (("tiny", "--top-p", "0", "x"), "--top-p 0: must be above 0, at most 1"),
        (("tiny", "--solution", "s", "x"), "are shown to the teacher only"),
        (("tiny", "--file", "nope.txt"), "nope.txt cannot be read"),
        (("tiny", "--file", "nope.jsonl"), "nope.jsonl: cannot be read"),
        (("tiny", "--seed", "-1", "x"), "--seed -1: must be at least 0"),
        (("tiny", "--max-tokens", "9" * 30, "x"), "must be a number from 1 to 1,000,000,000"),
        (("tiny", "--temperature", "inf", "x"), "--temperature inf: must be at least 0, and finite"),
        (("tiny", "a\udcff"), "'a\\udcff' holds a NUL or bytes that are not UTF-8"),
        (("tiny", "--step", "3", "x"), "--step is of a run, and tiny is none"),
        (("tiny", " "), "the prompt is empty"),
        (("./nope", "x"), "neither a run folder nor a model folder"),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_line(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_line_of_a_file_that_is_no_prompt_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for text, told in (("{", "p.jsonl:2: not JSON"), ('{"text": 1}', "p.jsonl:2: needs an object with `prompt`")):
        Path("p.jsonl").write_text(f'{{"prompt": "x"}}\n{text}\n')
        assert main(["generate", "tiny", "--file", "p.jsonl"]) == 2
        assert told in capsys.readouterr().err


def test_a_prompt_with_an_equals_sign_is_no_setting() -> None:
    assert _is_setting("eval.temperature=0.5")
    assert not any(map(_is_setting, ("12+30=", "What is x=3?", "3 = 3", "plain")))


def test_a_prompt_is_what_stands_between_two_ends_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """U+2028 ends no line, and the mark that some editors put before UTF-8 is no part of the first prompt."""
    said = '"a\u2028b"'
    Path("p.jsonl").write_text(f'{{"prompt": {said}}}\n', encoding="utf-8-sig")
    Path("p.txt").write_text("a\u2028b\n\n", encoding="utf-8-sig")
    for file in ("p.jsonl", "p.txt"):
        assert main(["generate", "tiny", "--max-tokens", "1", "--file", file]) == 0
        assert json.loads(capsys.readouterr().out)["prompt"] == "a\u2028b"
    Path("p.jsonl").write_text("[" * 100_000)
    assert main(["generate", "tiny", "--file", "p.jsonl"]) == 2
    assert "p.jsonl:1: not usable JSON" in capsys.readouterr().err


def test_bytes_from_a_pipe_that_are_no_text_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert main(["generate", "tiny"]) == 2
    assert capsys.readouterr().err == "opsd: standard input is not text in utf-8: invalid start byte\n"


def test_a_large_seed_draws(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "tiny", "--temperature", "1", "--max-tokens", "1", "--seed", str(2**63 - 1), "x"]) == 0
