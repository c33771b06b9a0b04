"""Recipes are data: attack recipes and attack overrides, each refused with its file and line, and no canary left."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from recipe_support import opsd, problems_of, write_recipe

from opsd_cli.settings import compose
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import builtin_folder, find_folders, loader_of
from opsd_cli.settings.recipe_scan import scan

CANARY = "canary"
HEAD = (
    "# @package _global_\n# looks harmless\ndefaults:\n  - override /model: tiny\n  - override /dataset: arithmetic\n"
)
CALLBACK = "hydra: {callbacks: {x: {_target_: test_recipe_scan.leave_a_canary}}}\n"
FACTORY = (
    "hydra:\n  job_logging:\n    version: 1\n    root: {level: INFO, handlers: [x]}\n"
    "    handlers: {x: {'()': test_recipe_scan.leave_a_canary}}\n"
)

ATTACKS = {
    "a callback of Hydra": (HEAD + CALLBACK, "'hydra'"),
    "a logging factory": (HEAD + FACTORY, "'()'"),
    "a logging class": (HEAD + "hydra: {job_logging: {handlers: {x: {class: os.system}}}}\n", "'class'"),
    "an instantiated section": (HEAD + "train: {_target_: os.system}\n", "'_target_'"),
    "arguments for one": (HEAD + "train: {x: {_args_: [touch canary], _partial_: true}}\n", "'_args_'"),
    "one inside a list": (HEAD + "train: {steps: [{_target_: os.system}]}\n", "'_target_'"),
    "a key with dots": (HEAD + "'hydra.callbacks.x._target_': os.system\n", "'hydra'"),
    "a package of Hydra's": (
        "# @package hydra.callbacks.x\n# x\n_target_: os.system\n",
        "`@package hydra.callbacks.x`",
    ),
    "a package with blanks": ("#   @package   hydra\n# x\ncallbacks: {}\n", "`@package hydra`"),
    "an environment variable": (HEAD + "run: {root: '${oc.env:HOME}'}\n", "no resolvers"),
    "a nested reference": (HEAD + "run: {root: '${${oc.env:HOME}}'}\n", "no resolvers"),
    "a decoded value": (HEAD + "run: {root: '${oc.decode:${run.root}}'}\n", "no resolvers"),
    "a Python tag": (HEAD + "run: !!python/object/apply:os.system [touch canary]\n", "YAML tags"),
    "a harmless tag": (HEAD + "run: {root: !!str runs}\n", "YAML tags"),
    "an alias bomb": (HEAD + "run: &a {root: x}\ntrain: *a\n", "anchors and aliases"),
    "an option of Hydra's": (HEAD + "  - override hydra/job_logging: stdout\n", "unknown group"),
    "an option of Hydra's, absolute": (HEAD + "  - override /hydra/callbacks: evil\n", "unknown group"),
    "a moved group": (HEAD + "  - /context@hydra.job.env_set: solution\n", "move settings"),
    "a file outside": (HEAD + "  - ../../outside\n", "not the name of an option"),
    "a file outside, as an option": (HEAD + "  - override /optim: ../../outside\n", "not the name of an option"),
    "a computed option": (HEAD + "  - override /optim: ${model.path}\n", "not the name of an option"),
    "an absolute file": (HEAD + "  - override /optim: /tmp/outside\n", "not the name of an option"),
    "a group that methods own": (HEAD + "  - override /teacher: live\n", "belongs to a method"),
    "a launcher": (HEAD + "  - override /launcher: deepspeed\n", "may not override /launcher"),
    "runs in another place": (HEAD + "run: {root: /tmp/canary}\n", "below the working folder"),
    "runs in the home folder": (HEAD + "run: {root: ~/canary}\n", "below the working folder"),
    "runs above": (HEAD + "run: {root: runs/../../canary}\n", "below the working folder"),
    "runs in a computed place": (HEAD + "run: {root: '${model.path}'}\n", "below the working folder"),
    "a run's name that climbs": (HEAD + "run: {name: ../canary}\n", "below the working folder"),
    "a token": (HEAD + f"prompts: {{system: 'hf_{'a1' * 17}'}}\n", "looks like a secret"),
    "code from the hub": (HEAD + "model: {trust_remote_code: true}\n", "trust_remote_code"),
    "code from the hub, spelt otherwise": (HEAD + "model: {trust_remote_code: 'yes'}\n", "trust_remote_code"),
}

OVERRIDES = {
    "+hydra.callbacks.x._target_=test_recipe_scan.leave_a_canary": "belongs to Hydra",
    "++hydra.callbacks={x:{_target_:test_recipe_scan.leave_a_canary}}": "belongs to Hydra",
    "hydra.launcher._target_=os.system": "'_target_'",
    "+hydra.launcher={_target_:os.system}": "'_target_'",
    "hydra.sweeper={_target_:os.system}": "'_target_'",
    "hydra/job_logging=stdout": "belongs to Hydra",
    "hydra/launcher=evil": "choose one of",
    "hydra/callbacks=evil": "belongs to Hydra",
    "hydra.job.env_set={LD_PRELOAD:x}": "belongs to Hydra",
    "hydra.searchpath=[recipes]": "--recipes DIR",
    "hydra.run.dir=/tmp/x": "run.root",
    "hydra.output_subdir=x": "run.root",
    "hydra.sweep.dir='${oc.env:HOME}'": "no resolvers",
    "hydra.sweep.subdir='${oc.env:HOME}'": "no resolvers",
    "+train._target_=os.system": "'_target_'",
    "+train={_target_:os.system}": "'_target_'",
    "run.root='${oc.env:HOME}'": "no resolvers",
    "lora.targets=['${oc.env:HOME}']": "no resolvers",
    "recipe=../../outside": "unknown recipe",
    "optim=/tmp/outside": "unknown optim",
    "run.name=../../x": "must be letters",
}


def leave_a_canary(*args: object, **kwargs: object) -> None:
    Path(CANARY).touch()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("text", [HEAD + CALLBACK, HEAD + FACTORY], ids=["callback", "factory"])
@pytest.mark.slow
def test_without_the_guard_hydra_would_run_what_a_recipe_names(text: str) -> None:
    write_recipe(Path("recipes"), "recipe/evil", text)
    folders = find_folders()
    with suppress(ValueError):  # what it called is no callback and no handler; by then it has been called
        compose.run_sweep(["recipe=evil"], folders, subfolder=None, run_member=lambda job: 0.0)
    assert Path(CANARY).exists()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.slow
def test_an_attack_in_a_recipe_is_refused_by_every_command(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = ATTACKS[attack]
    write_recipe(Path("recipes"), "recipe/evil", text)
    for command in (
        ["train", "recipe=evil"],
        ["train", "recipe=quickstart"],
        ["train", "--cfg", "job", "recipe=evil"],
        ["eval", "tiny", "recipe=evil"],
        ["recipes", "show", "evil"],
    ):
        code, _, err = opsd(capsys, *command)
        assert code == 2
        assert words in err
        assert "recipes/recipe/evil.yaml:" in err
        assert "Traceback" not in err
    assert not Path(CANARY).exists()


@pytest.mark.parametrize("group", ["model", "method", "divergence"])
def test_every_group_of_a_users_folder_is_read(group: str) -> None:
    write_recipe(Path("recipes"), f"{group}/sub/evil", "# x\n_target_: os.system\n")
    (problem,) = problems_of("recipe=quickstart")
    assert problem.startswith(f"recipes/{group}/sub/evil.yaml:2: the key '_target_' is not allowed")


@pytest.mark.parametrize("word", OVERRIDES)
def test_an_attack_on_the_command_line_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = opsd(capsys, "train", "-m", "recipe=quickstart", word)
    assert code == 2
    assert OVERRIDES[word] in err
    assert not any(Path().iterdir())


def test_a_users_config_yaml_would_replace_ours_and_is_refused() -> None:
    own = Path("recipes/config.yaml")
    own.parent.mkdir()
    own.write_text("defaults: [_self_]\n")
    assert problems_of("recipe=quickstart")[0].startswith("recipes/config.yaml: would replace opsd's own config.yaml")
    own.write_bytes((builtin_folder() / "config.yaml").read_bytes())
    assert not problems_of("recipe=quickstart")


def test_a_users_hydra_folder_is_refused() -> None:
    write_recipe(Path("recipes"), "hydra/launcher/joblib", "_target_: os.system\n")
    assert "recipes cannot configure Hydra" in problems_of("recipe=quickstart")[0]


def test_a_folder_of_other_recipes_is_left_alone() -> None:
    write_recipe(Path("recipes"), "torchtune/llama", "optimizer:\n  _component_: torch.optim.AdamW\n  _target_: x\n")
    Path("recipes/train.py").write_text("print()")
    assert not problems_of("recipe=quickstart")


def test_every_problem_of_every_file_is_reported_at_once() -> None:
    write_recipe(Path("recipes"), "recipe/one", HEAD + "run: {class: x, _target_: y}\n")
    write_recipe(Path("recipes"), "model/two", "# @package hydra\n# x\npath: ${oc.env:X}\n")
    with pytest.raises(ConfigError) as caught:
        scan(find_folders())
    assert len(caught.value.problems) == 4


def test_a_deeply_nested_or_huge_file_is_refused_in_one_line() -> None:
    path = write_recipe(Path("recipes"), "recipe/evil", "run: " + "[" * 5000 + "\n")
    assert "nested too deeply" in problems_of("recipe=quickstart")[0]
    path.write_text("# " + "x" * (1 << 20))
    assert "a recipe file has at most" in problems_of("recipe=quickstart")[0]


def test_aliases_are_refused_before_anybody_follows_them() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    write_recipe(Path("recipes"), "recipe/evil", bomb)
    assert problems_of("recipe=quickstart")[0].startswith(
        "recipes/recipe/evil.yaml:1: YAML anchors and aliases are not"
    )
    write_recipe(Path("recipes"), "recipe/evil", "run: &a [*a]\n")
    assert "anchors and aliases" in problems_of("recipe=quickstart")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("? [a, b]\n: c\n", ":6: a key is a word, not a list or a mapping"),
        ("? {a: b}\n: c\n", ":6: a key is a word, not a list or a mapping"),
        ("train: " + "{a: " * 40 + "1" + "}" * 40 + "\n", ":6: nested too deeply for a recipe"),
        ('run: {root: "a\\0b"}\n', ":6: 'a\\x00b' is not allowed: it holds a NUL character"),
    ],
)
def test_odd_yaml_is_refused_in_one_line(text: str, said: str) -> None:
    write_recipe(Path("recipes"), "recipe/evil", HEAD + text)
    assert problems_of("recipe=evil")[0] == f"recipes/recipe/evil.yaml{said}"


def test_a_number_that_python_does_not_read_is_a_problem() -> None:
    write_recipe(Path("recipes"), "recipe/evil", HEAD + f"train: {{steps: {'9' * 5000}}}\n")
    assert "4300 digits" in problems_of("recipe=evil")[0]


def test_a_users_file_is_read_by_the_parser_that_hydra_uses() -> None:
    own = write_recipe(Path("recipes"), "recipe/mine", HEAD)
    assert loader_of(own.resolve()) is yaml.SafeLoader
    if yaml.__with_libyaml__:
        assert loader_of(builtin_folder() / "config.yaml") is yaml.CSafeLoader
        assert loader_of(builtin_folder() / "recipe" / "gsm8k.yaml") is yaml.CSafeLoader


def test_the_built_in_recipes_pass_the_guard() -> None:
    scan(find_folders())
