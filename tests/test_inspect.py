"""`opsd inspect`: what is shown of a token is what is trained on, and its page is safe and complete."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recipe_support import opsd

from opsd_cli import api
from opsd_cli.cli import main
from opsd_cli.insight.samples import CLASSES, RolloutView, TokenView
from opsd_cli.ui.differences import differences
from opsd_cli.ui.inspect_text import print_rollouts
from opsd_cli.ui.pages import inspect_page

SMALL = ("recipe=quickstart", "eval.problems=0", "dataset.train_problems=8", "sampling.max_completion_tokens=64",
         "dataset.validation_problems=0", "dataset.test_problems=8", "dataset.retention_problems=0")  # fmt: skip
HOSTILE = "</script><img src=x onerror=alert(1)> \x1b[31m \u202egnp [/b] {{ 7*7 }} & 'q' \"w\""


def looked_at(*words: str) -> tuple[list[RolloutView], list[list[float]]]:
    """Two rollouts, and what `score` says of their tokens."""
    with api.Session(api.compose(*SMALL, *words)) as session:
        rollouts = session.sample(session.render(session.problems[:2]))
        return session.inspect(rollouts), session.score(rollouts)


def test_what_is_shown_of_a_token_is_what_is_trained_on() -> None:
    views, scores = looked_at()
    for view, losses in zip(views, scores, strict=True):
        assert [token.loss for token in view.tokens] == pytest.approx(losses, abs=1e-6)
        assert "".join(token.text for token in view.tokens) == view.completion
        for token in view.tokens:
            assert token.divergence == pytest.approx(token.forward_kl, abs=1e-6)  # what this recipe minimises
            for expected in (token.student_expects, token.teacher_expects):
                shares = [share for _, share in expected]
                assert shares == sorted(shares, reverse=True)
                assert sum(shares) <= 1 + 1e-5
        assert sum(view.share_by_class.values()) == pytest.approx(1.0)


def test_what_rules_take_out_is_shown_beside_what_was_there() -> None:
    views, _ = looked_at("clip=token", "clip.limit=0.01", "tokens=skip3")
    for view in views:
        assert [token.weight for token in view.tokens[:3]] == [0.0] * 3
        assert all(token.loss == 0.0 for token in view.tokens[:3])
        assert max(token.loss for token in view.tokens) <= 0.01 + 1e-6
    assert max(token.divergence for view in views for token in view.tokens) > 0.1


def test_a_token_rule_of_ones_own_is_shown_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "token_rule", "digits_twice"]) == 0
    with api.Session(api.compose(*SMALL, "token_rule=digits_twice", plugins=["digits_twice.py"])) as session:
        (view,) = session.inspect(session.sample(session.render(session.problems[:1])))
    by_digit = {any(letter.isdigit() for letter in token.text): token.weight for token in view.tokens}
    assert by_digit[True] > by_digit[False]


def test_a_teacher_that_is_shown_nothing_and_is_the_student_differs_nowhere() -> None:
    views, _ = looked_at("teacher=live", "context=none")
    tokens = [token for view in views for token in view.tokens]
    assert max(abs(token.loss) for token in tokens) < 1e-6
    assert all(token.student_expects[0][0] == token.teacher_expects[0][0] for token in tokens)


def test_the_same_completion_is_held_against_a_second_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.html"
    words = ["inspect", *SMALL, "--against", "context=answer_only", "--json", "--html", str(file)]
    code, out, _ = opsd(capsys, *words)
    assert code == 0
    ((first, second),) = json.loads(out)
    assert first["completion"] == second["completion"]
    assert first["student_prompt"] == second["student_prompt"]
    assert "Reference solution" in first["teacher_prompt"]
    assert first["teacher_prompt"] != second["teacher_prompt"]
    assert "against context=answer_only" in file.read_text(encoding="utf-8")


def test_many_rollouts_are_scored_in_micro_batches_with_the_same_numbers() -> None:
    with api.Session(api.compose(*SMALL)) as session:
        rollouts = session.sample(session.render(session.problems[:4]))
        whole = session.inspect(rollouts)
    with api.Session(api.compose(*SMALL, "train.micro_batch_tokens=1")) as session:  # each by itself
        pieces = session.inspect(rollouts)
    assert [view.problem for view in pieces] == [view.problem for view in whole]
    for one, other in zip(pieces, whole, strict=True):
        assert [token.loss for token in one.tokens] == pytest.approx([token.loss for token in other.tokens], abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_is_looked_at_with_the_teacher_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warm_ranks: None
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("teacher=ema", "optim.lr=1e-2", "optim.warmup_steps=0", "train.problems_per_step=2")
    trained = (*SMALL, *words, "train.steps=2", "checkpoint.every=1", "sampling.temperature=0", "run.name=r")
    assert opsd(capsys, "train", *trained)[0] == 0

    def looked(*flags: str) -> list[dict]:
        code, out, err = opsd(capsys, "inspect", "runs/r", "--json", *flags)
        assert code == 0, err
        assert "stand in" not in err if flags else "stand in" in err
        return json.loads(out)[0][0]["tokens"]

    exported, last, first = looked(), looked("--step", "last"), looked("--step", "1")
    assert [token["student_probability"] for token in exported] == [token["student_probability"] for token in last]
    assert first != last
    # Of an export the student stands in for its average, which moves less.
    assert [token["teacher_probability"] for token in exported] != [token["teacher_probability"] for token in last]
    for flags, message in (
        (("--step", "7"), "has no checkpoint of step 7; its checkpoints are of steps 1, 2"),
        (("--step", "best"), "has no best checkpoint"),
        (("--step", "soon"), "give the number of a step, last or best"),
        (("--step", "last", "model=tiny"), "the model is the run's"),
    ):
        code, _, err = opsd(capsys, "inspect", "runs/r", *flags)
        assert (code, message in err) == (2, True), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "recipe=quickstart", "--step", "last"), "--step is of a run"),
        (("inspect",), "name a recipe or a run"),
        (("inspect", "recipe=quickstart", "--problems", "0"), "--problems 0: 1 to 20 can be looked at"),
        (("inspect", "recipe=quickstart", "--problems", "2", "--problem", "x"), "give one of the two"),
        (("inspect", "./none"), "neither a run folder nor a model folder"),
        (("inspect", "recipe=quickstar"), "did you mean"),
    ],
)
def test_what_cannot_be_looked_at_is_told(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = opsd(capsys, *words)
    assert code == 2
    assert message in err


def token(text: str, **changes: object) -> TokenView:
    facts = {
        "text": text, "id": 1, "kind": "other", "divergence": 2.0, "loss": 1.5, "weight": 1.0, "forward_kl": 2.0,
        "reverse_kl": 1.0, "student_probability": 0.5, "teacher_probability": 0.1, "student_entropy": 1.0,
        "teacher_entropy": 0.5, "student_expects": ((text, 0.5),), "teacher_expects": ((text, 0.6),),
    }  # fmt: skip
    return TokenView(**{**facts, **changes})


def view(*texts: str) -> RolloutView:
    return RolloutView(
        HOSTILE, HOSTILE, f"{HOSTILE} more", "".join(texts), HOSTILE, False, "stop", tuple(map(token, texts))
    )


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_shows_any_text_literally_and_every_token_is_reached_by_keyboard() -> None:
    page = _Tags()
    text = inspect_page([[view(HOSTILE, " b")]], title=HOSTILE, against="")
    page.feed(text)
    assert {"script", "img", "iframe", "link"}.isdisjoint(tag for tag, _ in page.tags)
    assert "\x1b" not in text
    assert "\u202e" not in text
    tokens = [found for tag, found in page.tags if tag == "span" and (found.get("class") or "").startswith("token")]
    assert [found["tabindex"] for found in tokens] == ["0", "0"]


def test_a_token_is_explained_where_it_is_pointed_at_and_reached_by_a_link() -> None:
    page = inspect_page([[view("one", " two\n")]], title="t", against="")
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert ".token:focus > .pop" in style  # as it was written: a browser reads no entities there
    assert "&" not in style
    for place, shown in ((1, "one"), (2, "\u2423two\u21b5")):
        assert f'<a class="chip" href="#t1-{place}"><code>{shown}</code>' in page
        assert f'<span id="t1-{place}" class="token"' in page
    little = inspect_page([[replace(view("a"), tokens=(token("a"), token("b", loss=0.01)))]], title="t", against="")
    assert little.count('class="chip"') == 1


def test_four_thousand_tokens_would_stay_a_page_of_five_megabytes() -> None:
    a_tenth = inspect_page([[view(*["word "] * 400)]], title="t", against="")
    assert len(a_tenth) < 500_000


def test_the_terminal_shows_no_control_code_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    print_rollouts([[view(HOSTILE, " b"), view(HOSTILE, " b")]], against="context=none")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[/b]" in out


def test_the_words_of_one_text_only_are_marked() -> None:
    first, second = differences("a b c", "a x c d")
    assert [text for text, own in first if own] == ["b"]
    assert [text for text, own in second if own] == ["x", " d"]
    assert "".join(text for text, _ in second) == "a x c d"
    assert set(CLASSES) == {"style", "number", "other"}
