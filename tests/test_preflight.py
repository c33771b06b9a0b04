"""Bad command lines, each answered before anything heavy is imported: rows 1 to 11 of the table of faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_support import config_of, members_of, only_problem_of, problems_of

from opsd_cli.settings.command_line import parse_line
from opsd_cli.settings.compose import session
from opsd_cli.settings.idle_settings import SWITCHES, Switch
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.typed_config import plain_tree

QUICK = "recipe=quickstart"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_misspelt_key_is_answered_with_the_nearest_one() -> None:
    assert "unknown key 'optm.lr'" in only_problem_of(QUICK, "optm.lr=1")
    assert "did you mean 'optim.lr'?" in only_problem_of(QUICK, "optm.lr=1")
    assert "did you mean 'train.steps'?" in only_problem_of(QUICK, "train.stepz=1")


def test_a_misspelt_group_is_answered_with_the_group() -> None:
    assert only_problem_of("recipe=quickstart", "divergenc=jsd") == (
        "unknown key 'divergenc' (command line) - did you mean 'divergence'?"
    )
    assert "did you mean 'sampler'?" in only_problem_of("recipe=quickstart", "smapler=static")
    assert "did you mean 'train.steps'?" in only_problem_of("recipe=quickstart", "steps=3")


def test_a_key_without_its_section_is_answered_with_the_whole_key() -> None:
    assert "did you mean 'optim.lr'?" in only_problem_of(QUICK, "lr=1e-4")
    assert "did you mean 'train.problems_per_step'?" in only_problem_of(QUICK, "batch_size=3")


@pytest.mark.parametrize("word", ["+new.key=1", "++new.key=1", "new.key=1", "+optim.lrr=1"])
def test_an_unknown_key_is_refused_whatever_stands_before_it(word: str) -> None:
    assert "unknown key" in only_problem_of(QUICK, word)


def test_a_plus_before_a_known_key_is_named() -> None:
    assert "without the +" in only_problem_of(QUICK, "+train.steps=3")
    assert config_of(QUICK, "++train.steps=3").train.steps == 3


@pytest.mark.parametrize("value", ["abc", "1.5", "null", "", "[1]", "true"])
def test_a_wrong_type_names_the_key_what_was_got_and_what_is_wanted(value: str) -> None:
    problem = only_problem_of(QUICK, f"train.steps={value}")
    assert problem.startswith("train.steps: must be a valid integer (got ")
    assert problem.endswith("(command line)")


def test_text_that_looks_like_a_number_is_explained() -> None:
    problem = only_problem_of(QUICK, "run.name=2024")
    assert "must be text" in problem
    assert config_of(QUICK, "run.name='\"2024\"'".replace("'", "")).run.name == "2024"


def test_all_problems_of_a_line_are_listed_together() -> None:
    problems = problems_of(QUICK, "optm.lr=1", "optim.lr=-1", "divergence=jds", "train.steps=x", "eval.split=tset", "y")
    assert len(problems) == 6
    for word in (
        "optm.lr",
        "optim.lr: must be greater than 0",
        "divergence=jds",
        "train.steps",
        "'test'?",
        "'y' is not",
    ):
        assert any(word in problem for problem in problems), word


def test_numbers_out_of_range_or_not_finite_are_refused() -> None:
    assert "must be greater than 0" in only_problem_of(QUICK, "optim.lr=0")
    assert "must be a finite number" in only_problem_of(QUICK, "optim.lr=inf")
    assert "greater than or equal to 2" in only_problem_of(QUICK, "checkpoint.keep_last=1")
    assert "less than 1" in only_problem_of(QUICK, "optim.betas=[0.9,1.0]")


def test_contradictions_name_both_settings() -> None:
    greedy = only_problem_of(QUICK, "sampling.temperature=0", "train.rollouts_per_problem=4")
    assert "sampling.temperature=0" in greedy
    assert "train.rollouts_per_problem=1" in greedy
    assert "zero.stage=3" in only_problem_of(QUICK, "zero.offload_parameters=cpu")


def test_a_missing_choice_lists_what_there_is() -> None:
    assert only_problem_of(QUICK, "model=???").startswith("model is required: model=")
    assert "dataset is required: dataset=" in only_problem_of("model=tiny")


def test_a_line_without_a_recipe_is_asked_for_one() -> None:
    assert only_problem_of().startswith("choose a recipe: recipe=")
    assert config_of("model=tiny", "dataset=arithmetic").model.path == "bundled:tiny"


def test_a_setting_that_must_be_given_is_named_with_its_meaning() -> None:
    problem = only_problem_of("recipe=jsonl")
    assert problem.startswith("dataset.path is required (one file, a folder or glob")


def test_an_interpolation_that_points_nowhere_is_found_at_once() -> None:
    problem = only_problem_of(QUICK, "train.steps=${nope}")
    assert problem.startswith("train.steps: ${nope} points to nothing")
    assert config_of(QUICK, "eval.problems=${train.steps}").eval.problems == 80


def test_an_unknown_option_is_answered_with_the_nearest_and_the_list() -> None:
    problem = only_problem_of("recipe=gsmk8")
    assert "did you mean 'gsm8k'?" in problem
    assert "opsd recipes" in problem


def test_a_hub_id_in_place_of_a_model_option_is_explained() -> None:
    assert "model=hf model.path=Qwen/Qwen3-1.7B" in only_problem_of("recipe=gsm8k", "model=Qwen/Qwen3-1.7B")


def test_blanks_around_the_equals_sign_are_said_in_plain_words() -> None:
    problems = problems_of(QUICK, "optim.lr", "=", "3")
    assert problems == ("'optim.lr = 3': no spaces around '='; write optim.lr=3",)
    assert problems_of(QUICK, "optim.lr = 3") == ("'optim.lr = 3': no spaces around '='; write optim.lr=3",)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("lr", "is not KEY=VALUE"),
        ("quickstart", "did you mean 'recipe=quickstart'?"),
        ("recipe", "write recipe=NAME"),
        ("optim.lr=[1", "the [ is never closed"),
        ("optim.lr=1]", "the ] closes nothing"),
        ("prompts.system='abc", "the ' is never closed"),
        ("a b=3", "is not the name of a setting"),
        ("=3", "is not the name of a setting"),
        ("prompts.system=a:b c{", "never closed"),
    ],
)
def test_a_slip_of_grammar_is_said_without_the_names_of_a_lexer(word: str, words: str) -> None:
    problem = only_problem_of(QUICK, word)
    assert words in problem
    assert "Lexer" not in problem
    assert "hydra.cc" not in problem


def test_several_values_without_a_sweep_offer_both_ways_out() -> None:
    problem = only_problem_of(QUICK, "optim.lr=1e-4,3e-4")
    assert "add -m" in problem
    assert "quote it" in problem
    assert config_of(QUICK, "prompts.system='a,b'").prompts.system == "a,b"


def test_a_sweep_stands_for_every_combination() -> None:
    members = members_of(QUICK, "divergence=forward_kl,jsd", "train.steps=1,2,3", multirun=True)
    assert len(members) == 6
    assert (members[1].choices["divergence"], members[1].config.train.steps) == ("forward_kl", 2)
    assert len(members_of(QUICK, "run.seed=range(0,5)", multirun=True)) == 5
    assert len(members_of(QUICK, "divergence=glob(*_kl)", multirun=True)) == 4


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.key)
def test_a_setting_that_another_switches_off_is_refused_where_it_is_typed(switch: Switch) -> None:
    off = f"{switch.key}={'null' if switch.off is None else switch.off}"
    tree = plain_tree(config_of(QUICK, off))
    for key in switch.idle:
        section, name = key.split(".")
        typed = f"{key}={json.dumps(tree[section][name])}"
        assert f"{key} does nothing with {off}" in only_problem_of(QUICK, off, typed)


def test_a_sweep_may_switch_off_in_one_member_what_counts_in_another() -> None:
    assert len(members_of(QUICK, "clip=none,token", "clip.limit=0.5", multirun=True)) == 2
    assert "clip.limit does nothing" in only_problem_of(QUICK, "clip=none", "clip.limit=0.5,1", multirun=True)


def test_a_part_without_settings_says_so() -> None:
    assert "divergence=forward_kl has no settings" in only_problem_of(QUICK, "divergence.anything=1")
    assert "did you mean 'divergence.beta'" in only_problem_of(QUICK, "divergence=jsd", "divergence.betta=1")


def test_every_member_of_a_sweep_is_checked_before_the_first_one_runs() -> None:
    problems = problems_of(QUICK, "optim.lr=1e-4,-1", "divergence=jsd,jds", multirun=True)
    assert any("optim.lr: must be greater than 0 (got -1)" in problem for problem in problems) or len(problems) == 1
    assert any("divergence=jds" in problem for problem in problems)
    assert "optim.lr: must be greater than 0" in only_problem_of(QUICK, "optim.lr=1e-4,-1", multirun=True)


def test_a_key_that_another_option_has_names_that_option() -> None:
    problem = only_problem_of(QUICK, "divergence.beta=0.3")
    assert "divergence=forward_kl has no beta" in problem
    assert "divergence=jsd" in problem
    assert config_of(QUICK, "divergence=jsd", "divergence.beta=0.3").divergence.beta == 0.3


def test_nothing_can_be_removed_or_moved() -> None:
    assert "nothing can be removed" in only_problem_of(QUICK, "~divergence")
    assert "cannot be moved with @" in only_problem_of(QUICK, "model@teacher=tiny")


def test_a_mapping_on_the_command_line_is_checked_key_by_key() -> None:
    assert config_of(QUICK, "train={steps:3,problems_per_step:2}").train.steps == 3
    assert "unknown key 'train.stepz'" in only_problem_of(QUICK, "train={steps:3,stepz:4}")


def test_items_of_a_list_are_settings_too() -> None:
    assert config_of(QUICK, "optim.betas.0=0.5").optim.betas == (0.5, 0.95)
    assert "unknown key 'optim.betas.7'" in only_problem_of(QUICK, "optim.betas.7=0.5")


def test_the_model_lowers_the_limits_of_a_recipe_but_not_those_that_are_typed() -> None:
    config = config_of("recipe=gsm8k", "model=tiny")
    assert (config.sampling.max_completion_tokens, config.eval.max_completion_tokens) == (128, 128)
    config = config_of("recipe=gsm8k", "model=tiny", "sampling.max_completion_tokens=300")
    assert (config.sampling.max_completion_tokens, config.eval.max_completion_tokens) == (300, 128)


def test_code_from_the_hub_needs_the_command_line_and_a_revision() -> None:
    line = ("recipe=gsm8k", "model=hf", "model.path=owner/name")
    assert config_of(*line).model.trust_remote_code is False
    problem = only_problem_of(*line, "model.trust_remote_code=true")
    assert "pin the version you trust: model.revision=COMMIT" in problem
    assert config_of(*line, "model.trust_remote_code=true", "model.revision=abc123").model.trust_remote_code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run.seed=range(1,1000000000)",), "lists more than 1000 values"),
        (("run.seed=shuffle(range(1,1000000000))",), "lists more than 1000 values"),
        (("optim.lr=range(0,1,1e-12)",), "lists more than 1000 values"),
        (("run.seed=range(1,9,0)",), "the step of a range cannot be 0"),
        (("run.seed=range(9,1)",), "lists no value"),
        (("divergence=glob(nothing*)",), "lists no value"),
        (("run.seed=range(0,900)", "train.steps=range(1,900)"), "has 809,100 runs; one sweep has at most 1,000"),
    ],
)
def test_a_sweep_has_a_size_that_can_be_checked(words: tuple[str, ...], said: str) -> None:
    assert said in only_problem_of("recipe=quickstart", *words, multirun=True)


def test_a_problem_is_one_line_whatever_was_typed() -> None:
    assert problems_of("recipe=quickstart", "a\nb\x1b[31m=1") == (
        "'a\\nb\\x1b[31m=1': 'a\\nb\\x1b[31m' is not the name of a setting; write SECTION.KEY=VALUE",
    )
    assert "is not KEY=VALUE" in only_problem_of("recipe=quickstart", "{a:" * 3000)
    assert "never closed" in only_problem_of("recipe=quickstart", "train.steps=" + "{a:" * 3000)


def test_the_last_of_two_values_counts_as_in_hydra() -> None:
    assert config_of(QUICK, "train.steps=1", "train.steps=2").train.steps == 2


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
def test_any_text_is_an_override_or_a_problem_of_one_line(text: str) -> None:
    folders = find_folders()
    with session(folders):
        _, problems = parse_line([text], folders)
    for problem in problems:
        assert problem.strip()
        assert "\n" not in problem.replace(text, "")
