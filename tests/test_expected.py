"""`opsd report --check`: a run is within what its recipe expects, off, or not comparable, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_support import config_of, opsd
from run_support import PROBLEMS, make_run, quickstart

from opsd_cli.insight.expected import Check, check_run
from opsd_cli.insight.history import read_history
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.typed_config import plain_tree

FIGURES = ("before=0.25+-0.01", "after=0.75+-0.05")


def recipe(**expected: Any) -> dict[str, Any]:
    """What the recipe of `make_run` composes to, with these figures."""
    tree = plain_tree(quickstart())
    tree["train"]["steps"] = 20
    empty = dict.fromkeys(tree["expected"])
    tree["expected"] = empty | {"figures": FIGURES, **expected}
    return tree


def checked(folder: Path, tree: dict[str, Any] | None = None, **of_run: Any) -> Check:
    make_run(folder, "run", **of_run)
    return check_run(read_history(folder / "run"), recipe() if tree is None else tree)


def test_a_run_that_came_to_its_figures_is_within(tmp_path: Path):
    check = checked(tmp_path)
    assert (check.verdict, check.reasons) == ("within", ())
    assert [(figure.name, figure.found, figure.is_within) for figure in check.figures] == [
        ("before", 0.25, True), ("after", 0.75, True),
    ]  # fmt: skip


def test_a_run_that_ended_elsewhere_is_off(tmp_path: Path):
    check = checked(tmp_path, right=(10, 27))
    assert check.verdict == "off"
    assert [figure.is_within for figure in check.figures] == [True, False]


def test_a_figure_that_a_run_does_not_have_is_off(tmp_path: Path):
    check = checked(tmp_path, recipe(figures=("teacher_after=0.9+-0.5",)))
    assert (check.verdict, check.figures[0].found) == ("off", None)


@pytest.mark.parametrize(
    ("expected", "of_run", "reason"),
    [
        ({}, {"changes": {"optim.lr": 5.0}}, "other settings than the recipe's: optim.lr (0.001 -> 5.0)"),
        ({}, {"changes": {"run.seed": 1}}, "run.seed (0 -> 1)"),
        ({}, {"steps": 5}, "train.steps (20 -> 5)"),
        ({}, {"changes": {"train.steps": 40}}, "fewer steps: 20 of 40"),
        ({}, {"outcome": "failed"}, "the run is failed, not completed"),
        ({"version": "9.9"}, {}, "other opsd: the run does not record which, 9.9 in the recipe"),
        ({"model": "bytes:1"}, {}, "other model weights: the run does not record which"),
        ({"dataset": "g"}, {}, "other data: f in the run, g in the recipe"),
        ({"problems": PROBLEMS + 1}, {}, f"{PROBLEMS} problems evaluated, {PROBLEMS + 1} in the recipe"),
        ({"figures": ()}, {}, "its recipe carries no expected figures"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_different_about_a_run_makes_it_not_comparable(
    expected: dict[str, Any], of_run: dict[str, Any], reason: str, tmp_path: Path
):
    check = checked(tmp_path, recipe(**expected), **of_run)
    assert check.verdict == "not comparable"
    assert any(reason in given for given in check.reasons), check.reasons


def test_how_much_at_once_and_on_what_makes_no_difference(tmp_path: Path):
    changes = {
        "prompts.date": "2026-11-27",
        "zero.stage": 3,
        "loss.chunk_mib": 1,
        "launcher.threads": 2,
        "train.micro_batch_tokens": 512,
    }
    assert checked(tmp_path, changes=changes).verdict == "within"


def test_facts_that_agree_are_no_reason(tmp_path: Path):
    assert checked(tmp_path, recipe(dataset="f", problems=PROBLEMS)).verdict == "within"


def test_the_command_prints_each_figure_and_has_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs"), "short")
    code, out, _ = opsd(capsys, "report", "--check", "short")
    assert code == 2
    assert "short: not comparable" in out
    assert "train.steps (80 -> 20)" in out
    assert "0.954 +- 0.018" in out
    assert "docs/quickstart.md" in out
    recipes = Path("recipes") / "recipe"
    recipes.mkdir(parents=True)
    # A user's own, in the place of the built-in one.
    builtin = Path(__file__).parents[1] / "recipes" / "recipe" / "quickstart.yaml"
    text = builtin.read_text().partition("expected:")[0].replace("steps: 80", "steps: 20")
    for figure, expected in {"after=0.75+-0.05": 0, "after=0.954+-0.018": 4}.items():
        (recipes / "quickstart.yaml").write_text(f"{text}expected:\n  figures: [{figure}]\n")
        code, out, _ = opsd(capsys, "report", "--check", "short")
        assert code == expected, out


def test_check_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    code, _, err = opsd(capsys, "report", "--check", "--json", "x")
    assert code == 2
    assert "one of them at a time" in err


def test_the_quickstart_carries_the_figures_of_its_page():
    page = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    expected = quickstart().expected
    values = {text.partition("=")[0]: float(text.partition("=")[2].partition("+-")[0]) for text in expected.figures}
    assert f"accuracy   {values['before']:.1%}".replace("%", " %") in page
    assert f"→ {values['after']:.1%}".replace("%", " %") in page
    assert f"{values['completion_tokens']:,.0f} completion tokens" in page
    assert expected.problems == 500


@pytest.mark.parametrize("figure", ["accuracy=0.9+-0.1", "after=0.9", "after=0.9+-", "after=nan+-1"])
def test_a_figure_in_another_form_is_refused(figure: str):
    with pytest.raises(ConfigError, match=r"expected\.figures"):
        config_of("recipe=quickstart", f"expected.figures=['{figure}']")
