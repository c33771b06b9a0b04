"""The recipes that ship: they compose in every combination, say what every key means, and keep to what they own."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_support import config_of, write_recipe

import opsd_cli.plugins  # noqa: F401
from opsd_cli.settings.compose import compose, resolve, session
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import (
    GROUPS,
    RecipeFile,
    builtin_folder,
    description,
    find_folders,
    overrides_of,
    read_recipe_file,
    with_bases,
    written_out,
)
from opsd_cli.settings.recipe_scan import METHOD_OWNS, RECIPE_OWNS
from opsd_cli.settings.registry import find_plugin, plugin_names
from opsd_cli.settings.typed_config import PLUGINS, SECTIONS, typed_config

FILES = find_folders().files
OPTIONS = [(group, option) for group, options in FILES.items() for option in options]
SETTING_OPTIONS = [(group, option) for group, option in OPTIONS if group not in ("recipe", "method")]
FIXED = [section for section in SECTIONS if section not in GROUPS]
LONGEST_DESCRIPTION = 140


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def file_of(group: str, option: str) -> RecipeFile:
    return read_recipe_file(FILES[group][option], group)


def tree_of(group: str, option: str) -> dict[str, Any]:
    """An option's settings, those that it takes over included."""
    return yaml.safe_load(written_out(find_folders(), group, option))


def given(tree: dict[str, dict]) -> dict[str, dict]:
    """The tree with something in place of every setting that must be given."""
    return {
        section: {key: "given" if value == "???" else value for key, value in values.items()}
        for section, values in tree.items()
    }


def problems_in(tree: dict[str, dict]) -> tuple[str, ...]:
    try:
        typed_config(tree)
    except ConfigError as error:
        return error.problems
    return ()


REASONS = ("uses no teacher", "needs a teacher", "use support=full", "use clip=none", "clip=token", "another rollout")
"""Why a combination makes no sense."""


@pytest.mark.slow
def test_every_recipe_composes_with_every_method_and_every_divergence() -> None:
    """Hydra composes every method with a recipe and a divergence in turn. What it makes of either is the same whatever
    the others are, so that the other combinations can be put together from these, and must be valid too: each
    divergence with every method, recipes in turn, so that each of them meets every method and every divergence."""
    recipes, methods, divergences = (list(FILES[group]) for group in ("recipe", "method", "divergence"))
    sections = cache(tree_of)
    of_recipe: dict[str, dict[str, Any]] = {}
    of_method: dict[str, dict[str, Any]] = {}
    with session(find_folders()):
        for method, recipe, divergence in zip(methods, itertools.cycle(recipes), itertools.cycle(divergences)):
            tree, choices = compose([f"recipe={recipe}", f"method={method}", f"divergence={divergence}"])
            own = {entry.group: entry.option for _, entry in overrides_of(find_folders(), "method", method)}
            own["divergence"] = divergence
            assert (choices["recipe"], choices["method"]) == (recipe, method)
            assert own.items() <= choices.items()
            of_method[method] = {section: tree.pop(section) for section in METHOD_OWNS}
            assert of_method[method] == {section: sections(section, own[section]) for section in METHOD_OWNS}
            assert tree == of_recipe.setdefault(recipe, tree)
    assert (len(of_recipe), len(of_method)) == (len(recipes), len(methods))
    for (i, method), (j, divergence) in itertools.product(enumerate(methods), enumerate(divergences)):
        recipe = recipes[(i + j) % len(recipes)]
        plain = given(of_recipe[recipe] | of_method[method] | {"divergence": sections("divergence", divergence)})
        if "${" in str(plain):
            plain, broken = resolve(plain)
            assert not broken
        problems = problems_in(plain)
        assert all(any(reason in p for reason in REASONS) for p in problems), (recipe, method, divergence, problems)


@pytest.mark.parametrize(("group", "option"), SETTING_OPTIONS)
def test_the_keys_of_an_option_are_the_fields_of_its_dataclass(group: str, option: str) -> None:
    tree = tree_of(group, option)
    shape = find_plugin(group, tree.pop("name")) if group in PLUGINS else SECTIONS[group]
    assert list(tree) == [field.name for field in fields(shape)]


def test_the_keys_of_the_fixed_sections_are_the_fields_of_their_dataclasses() -> None:
    tree = yaml.safe_load((builtin_folder() / "config.yaml").read_text())
    assert [key for key in tree if key not in ("defaults", "hydra")] == FIXED
    for section in FIXED:
        assert list(tree[section]) == [field.name for field in fields(SECTIONS[section])]


@pytest.mark.parametrize("kind", PLUGINS)
def test_every_plug_in_has_an_option_file(kind: str) -> None:
    names = {tree_of(kind, option)["name"] for option in FILES[kind]}
    assert names == set(plugin_names(kind))


@pytest.mark.parametrize(("group", "option"), SETTING_OPTIONS)
def test_every_key_of_an_option_has_one_comment_in_the_file_or_in_one_that_it_builds_on(
    group: str, option: str
) -> None:
    comments: dict[str, list[str]] = {}
    for file in with_bases(find_folders(), group, option):
        for key in file.keys:
            comments.setdefault(key.name, []).extend(filter(None, [key.comment]))
    assert all(len(said) == 1 for name, said in comments.items() if not name.endswith(".name")), comments


@pytest.mark.parametrize(("group", "option"), SETTING_OPTIONS)
def test_an_option_that_ships_builds_on_no_other_option_which_a_user_may_replace(group: str, option: str) -> None:
    assert all(entry.option.startswith("_") for entry in file_of(group, option).defaults)


ONE_OF_EACH = [
    {group: options[number] for group, options in by_group.items() if number < len(options)}
    for by_group in [{group: list(FILES[group]) for group in FILES if group not in ("recipe", "method")}]
    for number in range(max(map(len, by_group.values())))
]
"""Options of the groups side by side, so that each is chosen once: a composition takes a third of a second."""


def chosen_by(method: str) -> dict[str | None, str]:
    return {entry.group: entry.option for _, entry in overrides_of(find_folders(), "method", method)}


def most_bases(method: str) -> int:
    return len(list(with_bases(find_folders(), "method", method)))


@pytest.mark.parametrize("method", FILES["method"])
def test_a_method_written_out_chooses_the_same(method: str) -> None:
    """A method is what it chooses: it sets nothing."""
    before = chosen_by(method)
    path = write_recipe(Path("recipes"), f"method/{method}", written_out(find_folders(), "method", method))
    assert find_folders().files["method"][method] == path.resolve()
    assert chosen_by(method) == before
    file = read_recipe_file(path, "method")
    assert not [entry for entry in file.defaults if not entry.group]
    assert not file.keys


@pytest.mark.parametrize(
    "choices", [*ONE_OF_EACH, {"method": max(FILES["method"], key=most_bases)}, {"method": "opsd"}]
)
@pytest.mark.slow
def test_an_option_written_out_is_the_same_option(choices: dict[str, str]) -> None:
    """What `opsd recipes show` prints and `opsd recipes copy` writes."""
    words = [f"{group}={option}" for group, option in ({"model": "tiny", "dataset": "arithmetic"} | choices).items()]
    with session(find_folders()):
        before, _ = compose(words)
    for group, option in choices.items():
        write_recipe(Path("recipes"), f"{group}/{option}", written_out(find_folders(), group, option))
    with session(find_folders()):
        after, _ = compose(words)
    for section in before:
        assert json.dumps(after[section]) == json.dumps(before[section])
    for group, option in choices.items():
        file = read_recipe_file(find_folders().files[group][option], group)
        assert not [entry for entry in file.defaults if not entry.group]


def test_every_key_of_the_fixed_sections_has_a_comment() -> None:
    for key in read_recipe_file(builtin_folder() / "config.yaml", "").keys:
        assert key.comment, f"{key.name} at line {key.line}"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_begins_with_a_description_of_one_line(group: str, option: str) -> None:
    words = description(FILES[group][option])
    assert words
    assert len(words) <= LONGEST_DESCRIPTION


@pytest.mark.parametrize("recipe", FILES["recipe"])
def test_a_recipe_chooses_what_it_owns_and_sets_fixed_sections_only(recipe: str) -> None:
    file = file_of("recipe", recipe)
    assert {entry.group for entry in file.defaults} <= set(RECIPE_OWNS)
    assert {key.name.partition(".")[0] for key in file.keys} <= set(FIXED)
    assert f"#   opsd train recipe={recipe}" in file.text


@pytest.mark.parametrize("method", FILES["method"])
def test_a_method_chooses_all_that_it_owns_and_sets_nothing(method: str) -> None:
    assert {entry.group for _, entry in overrides_of(find_folders(), "method", method)} == set(METHOD_OWNS)
    assert not any(file.keys for file in with_bases(find_folders(), "method", method))


@pytest.mark.parametrize("recipe", FILES["recipe"])
@pytest.mark.slow
def test_the_commands_at_the_head_of_a_recipe_are_right(recipe: str) -> None:
    from recipe_support import problems_of

    for line in file_of("recipe", recipe).text.splitlines():
        match = re.match(r"#\s+opsd train (.*)", line)
        if match:
            words = re.sub(r"\s{2,}.*| #.*", "", match[1]).split()
            multirun = "-m" in words
            assert not problems_of(*(word for word in words if word != "-m"), multirun=multirun), line


def test_a_recipes_numbers_survive_the_primary_file() -> None:
    assert config_of("recipe=quickstart").train.steps == 80
    assert config_of("recipe=gsm8k").sampling.temperature == 1.1


def test_the_command_line_beats_the_recipe_and_the_recipe_beats_the_default() -> None:
    config = config_of("recipe=quickstart", "method=sft", "train.steps=3", "lora=r16")
    assert config.teacher.plugin_name == "none"
    assert config.divergence.plugin_name == "cross_entropy"
    assert (config.train.steps, config.lora.rank) == (3, 16)
    assert config_of("recipe=quickstart", "method=opsd_live", "teacher=initial").teacher.plugin_name == "initial"


def test_gsm8k_is_the_setting_of_the_methods_authors() -> None:
    config = config_of("recipe=gsm8k")
    assert config.model.path == "Qwen/Qwen3-1.7B"
    assert (config.lora.rank, config.lora.alpha) == (64, 128)
    assert (config.optim.lr, config.optim.max_grad_norm, config.optim.schedule) == (5e-6, 0.1, "constant")
    assert (config.train.steps, config.train.problems_per_step, config.train.rollouts_per_problem) == (100, 32, 1)
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.1, 0.95, 20)
    assert (sampling.max_completion_tokens, config.loss.temperature) == (1024, 1.1)
    assert (config.prompts.student_thinking, config.prompts.teacher_thinking) == (False, True)
    assert (config.teacher.plugin_name, config.divergence.plugin_name) == ("initial", "forward_kl")


def test_a_plug_in_of_the_users_own_folder_is_an_option_like_any_other() -> None:
    mine = Path("recipes/divergence/mine.yaml")
    mine.parent.mkdir(parents=True)
    mine.write_text("# A third\nname: jsd\nbeta: 0.3\nnormalize: true\n")
    assert config_of("recipe=quickstart", "divergence=mine").divergence.beta == 0.3


def test_a_path_may_begin_at_home_whichever_setting_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of(
        *(
            "recipe=jsonl",
            "model=hf",
            "model.path=~/model",
            "dataset.path=~/rows.jsonl",
            "model.chat_template=~/c.jinja",
        ),
        *("teacher=external", "teacher.path=~/teacher"),
    )
    paths = (config.model.path, config.dataset.path, config.model.chat_template, config.teacher.path)
    assert paths == tuple(str(tmp_path / name) for name in ("model", "rows.jsonl", "c.jinja", "teacher"))
