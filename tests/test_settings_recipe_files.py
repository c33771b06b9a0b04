"""Recipe files of the user's own: which is found, and what is said about a broken one."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_support import config_of, only_problem_of, problems_of, write_recipe

from opsd_cli.preflight import check
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import find_folders

QUICK = "recipe=quickstart"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_misspelt_key_in_a_recipe_file_names_file_and_line(tmp_path: Path) -> None:
    text = "# @package _global_\n# mine\ndefaults:\n  - override /model: tiny\ntrain:\n  stepz: 3\nwat: 1\n"
    write_recipe(tmp_path / "recipes", "recipe/mine", text)
    problems = problems_of("recipe=mine", "dataset=arithmetic")
    assert any("unknown section 'wat'" in problem and "recipes/recipe/mine.yaml:7" in problem for problem in problems)
    (stepz,) = [problem for problem in problems if "stepz" in problem]
    assert "did you mean 'train.steps'?" in stepz
    assert "(recipes/recipe/mine.yaml:6)" in stepz


def test_a_wrong_value_in_a_recipe_file_names_file_and_line(tmp_path: Path) -> None:
    text = "# @package _global_\n# mine\ntrain:\n  steps: many\n"
    write_recipe(tmp_path / "recipes", "recipe/mine", text)
    problem = only_problem_of("recipe=mine", "model=tiny", "dataset=arithmetic")
    assert problem == "train.steps: must be a valid integer (got 'many') (recipes/recipe/mine.yaml:4)"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("train:\n\tsteps: 3\n", "recipes/recipe/mine.yaml:2:1: broken YAML"),
        ("train:\n  steps: 3\n problems: 4\n", "recipes/recipe/mine.yaml:3:"),
        ("train: [1, 2\n", "recipes/recipe/mine.yaml:2:1: broken YAML"),
        ("- a\n- b\n", "recipes/recipe/mine.yaml:1: a recipe file holds `key: value` lines"),
        ("train: {steps: 3, steps: 4}\n", "recipes/recipe/mine.yaml:1: duplicate key 'train.steps'"),
    ],
)
def test_broken_yaml_names_file_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    write_recipe(tmp_path / "recipes", "recipe/mine", text)
    assert only_problem_of(QUICK).startswith(place)


def test_a_recipe_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipes", "recipe/mine", "").write_bytes(b"# x\nrun:\n  root: \xff\xfe\n")
    assert only_problem_of(QUICK) == "recipes/recipe/mine.yaml:3: not UTF-8 text"


def test_a_recipe_that_names_an_unknown_option_names_file_and_line(tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipes", "recipe/mine", "# @package _global_\ndefaults:\n  - override /model: tinny\n")
    problems = problems_of("recipe=mine", "optm.lr=1")
    assert any("recipes/recipe/mine.yaml:3: model=tinny: unknown model - did you mean 'tiny'?" in p for p in problems)
    assert any("optm.lr" in problem for problem in problems)


def test_a_file_named_yml_is_pointed_out(tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipes", "recipe/mine", "").rename(tmp_path / "recipes/recipe/mine.yml")
    assert (
        only_problem_of("recipe=mine")
        == "recipe=mine: rename recipes/recipe/mine.yml to .yaml; Hydra does not read .yml files"
    )


def test_a_users_recipe_is_found_before_the_built_in_one_of_the_same_name(tmp_path: Path) -> None:
    text = "# @package _global_\n# mine\ndefaults:\n  - quickstart_base\n  - override /model: tiny\n"
    write_recipe(tmp_path / "recipes", "recipe/quickstart", text + "  - override /dataset: arithmetic\n")
    write_recipe(tmp_path / "recipes", "recipe/quickstart_base", "# @package _global_\ntrain: {steps: 7}\n")
    assert config_of(QUICK).train.steps == 7
    elsewhere = tmp_path / "elsewhere"
    write_recipe(elsewhere, "recipe/quickstart", text + "  - override /dataset: arithmetic\ntrain: {steps: 8}\n")
    _, (member,) = check([QUICK], find_folders(str(elsewhere)))
    assert member.config.train.steps == 8


def test_a_folder_of_config_dir_is_searched_last(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /dataset: arithmetic\n"
    write_recipe(tmp_path / "more", "recipe/quickstart", text + "train: {steps: 8}\n")
    write_recipe(tmp_path / "more", "recipe/other", text + "train: {steps: 9}\n")
    folders = find_folders(config_dir=str(tmp_path / "more"))
    assert check([QUICK], folders)[1][0].config.train.steps == 80
    assert check(["recipe=other"], folders)[1][0].config.train.steps == 9


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="--recipes nowhere: no such folder"):
        find_folders("nowhere")


def test_a_recipe_may_set_the_options_it_chose_and_no_others(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /dataset: jsonl\n"
    write_recipe(tmp_path / "recipes", "recipe/mine", text + "dataset:\n  path: data.jsonl\n")
    assert config_of("recipe=mine").dataset.path == "data.jsonl"
    leak = only_problem_of("recipe=mine", "dataset=gsm8k")
    assert leak.startswith("recipes/recipe/mine.yaml:6: dataset.path was written for dataset=jsonl")
    write_recipe(tmp_path / "recipes", "recipe/mine", text + "divergence:\n  beta: 0.3\n")
    assert any("divergence belongs to a method" in p for p in problems_of("recipe=mine", "dataset.path=x"))


def test_folders_may_have_blanks_and_letters_of_any_alphabet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "мои recipes = 1,2"
    text = "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /dataset: arithmetic\n"
    write_recipe(here / "recipes", "recipe/mine", text + "train: {steps: 9}\n")
    monkeypatch.chdir(here)
    assert config_of("recipe=mine").train.steps == 9
