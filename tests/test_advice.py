"""What is said before the first step: that the privileged context does not help or shows nothing, or that an evaluation
was cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from recipe_support import config_of
from yaml import safe_load

from opsd_cli.data.problems import Problem, PromptPair
from opsd_cli.insight.evaluation import Evaluation
from opsd_cli.insight.paired import compare
from opsd_cli.rank.advice import about_context, about_cut_evaluation, about_same_prompts
from opsd_cli.settings.config import Config, ContextSettings
from opsd_cli.settings.recipe_files import find_folders, written_out

quickstart = cache(lambda: config_of("recipe=quickstart"))


def with_context(name: str) -> Config:
    return replace(quickstart(), context=ContextSettings(**safe_load(written_out(find_folders(), "context", name))))


def said(config: Config | None = None, *, problems: int, both: int = 0, won: int = 0, lost: int = 0) -> str | None:
    """Of a run whose model solves `both` with and without the context, `won` only with it, `lost` only without."""
    student = {str(i): i < both + lost for i in range(problems)}
    teacher = {str(i): i < both or both + lost <= i < both + lost + won for i in range(problems)}
    verdict = about_context(
        config or quickstart(), compare(student, teacher), split="test", teacher=(both + won) / problems
    )
    return verdict and verdict.message


def test_a_solution_that_takes_accuracy_away_is_named_with_both_numbers_and_what_to_look_at():
    assert said(problems=32, both=8, lost=8) == (
        "the solution does not help this model: 25.0% right with it in the prompt, 50.0% without (test, 32 problems, "
        "difference -25.0 points, 95 % interval -39.5 to -8.3), so there is nothing to learn from such a teacher; look "
        "at both prompts with --dry-run and at evaluations/step_000000_test_teacher.jsonl, then try another context or "
        "a larger model"
    )


@pytest.mark.parametrize(
    ("numbers", "is_said"),
    [
        ({"problems": 500, "both": 170, "won": 330}, False),  # the quickstart
        ({"problems": 256, "both": 64, "won": 20, "lost": 20}, True),  # no gain, and no room for a large one
        ({"problems": 256, "both": 64, "won": 24, "lost": 20}, False),  # a gain, if a small one
        ({"problems": 32}, True),  # not one right, with the solution in view
        ({"problems": 32, "both": 4, "won": 4, "lost": 4}, False),  # noise
        ({"problems": 4}, False),  # few problems prove nothing
        ({"problems": 4, "lost": 1}, False),
        ({"problems": 8, "lost": 8}, True),  # but these do
    ],
)
def test_it_is_said_where_the_numbers_show_it_and_noise_is_not_shouted_at(numbers: dict[str, int], is_said: bool):
    assert (said(**numbers) is not None) == is_said


@pytest.mark.parametrize(
    ("context", "where_useless", "where_worse"),
    [
        ("solution", True, True),
        ("demonstration", True, True),
        ("answer_only", True, True),
        ("concise", False, True),  # nothing that would make it more accurate
        ("none", False, True),
        ("shuffled", False, False),  # controls are meant not to help
        ("first_step", False, False),
    ],
)
def test_each_context_is_judged_by_what_it_is_for(context: str, where_useless: bool, where_worse: bool):
    config = with_context(context)
    assert (said(config, problems=256, both=100) is not None) == where_useless
    assert (said(config, problems=256, both=100, lost=50) is not None) == where_worse


def test_nothing_is_said_of_a_teacher_that_is_another_model():
    config = config_of("recipe=quickstart", "teacher=external", "teacher.path=bundled:tiny_teacher")
    assert said(config, problems=256, both=100, lost=50) is None, "its accuracy was not measured"


def test_a_model_that_can_do_it_all_is_told_to_take_harder_problems():
    assert "adds nothing to what this model can do: 98.0% right" in said(problems=100, both=98)
    assert said(with_context("answer_only"), problems=100, both=98).startswith("context=answer_only adds nothing")


def test_a_teacher_that_is_shown_what_the_student_is_shown_is_counted():
    problem = Problem("p", "q", "s", "1")
    same, other = PromptPair(problem, (1, 2), (1, 2)), PromptPair(problem, (1, 2), (1, 3, 2))
    config = quickstart()
    message = about_same_prompts(config, [same, same, other]).message
    assert message.startswith("the teacher's prompt is the same as the student's in 2 of 3 training problems")
    assert about_same_prompts(config, [other]) is None
    assert about_same_prompts(with_context("none"), [same]) is None, "that is what it is for"


def test_an_evaluation_whose_completions_were_cut_names_the_share_and_the_key():
    evaluation = Evaluation("test", "student", 50, 3, 0.06, 0.02, 0.16, 15.0, 0.62, 1.0, 1.0)
    settings = quickstart().eval
    message = about_cut_evaluation(evaluation, settings).message
    assert message.startswith("62% of the evaluation's completions were cut by the length limit")
    assert message.endswith("raise eval.max_completion_tokens (now 64)")
    assert about_cut_evaluation(replace(evaluation, truncated=0.1), settings) is None
