"""The generated datasets: what every problem must hold, and what keeps the splits apart."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import yaml

from opsd_cli.data.arithmetic import (
    KNOWN_WORDINGS,
    LARGEST_VALUE,
    NEW_WORDINGS,
    Arithmetic,
    Equation,
    Puzzles,
    draw_story,
    split_of,
)
from opsd_cli.data.problems import Problem
from opsd_cli.settings.errors import DataError

RECIPES = Path(__file__).parents[1] / "recipes" / "dataset"
WORKED = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
NEW_WORDS = re.compile(r"acquires|harvests|squanders|forfeits|dozen|double|triples|halves|third|quarter")


def fields_of(name: str) -> dict:
    fields = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    del fields["name"]
    return fields


STORIES = Arithmetic(**fields_of("arithmetic"))
PUZZLES = Puzzles(**fields_of("puzzles"))


def numbers_of(problem: Problem) -> tuple[str, ...]:
    """Everything about a problem but its words."""
    return tuple(re.findall(r"\d+|[-+*/]", "".join(str(worked) for worked in WORKED.findall(problem.solution))))


@pytest.mark.parametrize("dataset", [STORIES, PUZZLES])
def test_the_run_seed_does_not_change_the_problems_and_the_data_seed_does(dataset):
    small = replace(dataset, train_problems=50, validation_problems=20, test_problems=20)
    assert small.load() == small.load()
    assert small.load().fingerprint != replace(small, data_seed=1).load().fingerprint


def test_changing_the_size_of_one_split_leaves_the_others_alone():
    small = replace(STORIES, train_problems=10, test_problems=20).load()
    large = STORIES.load()
    assert small.train == large.train[:10]
    assert small.validation == large.validation
    assert small.test == large.test[:20]


@pytest.mark.slow
def test_no_two_splits_share_structure_and_numbers():
    splits = STORIES.load()
    train, validation, test = ({numbers_of(p) for p in s} for s in (splits.train, splits.validation, splits.test))
    assert len(test) == len(splits.test), "no two test problems are the same but for their words"
    assert train.isdisjoint(validation)
    assert train.isdisjoint(test)
    assert validation.isdisjoint(test)


def test_puzzles_share_no_question_between_splits():
    splits = PUZZLES.load()
    questions = [problem.question for problem in (*splits.train, *splits.validation, *splits.test)]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("dataset", [STORIES, PUZZLES])
def test_every_reference_solution_works_out_to_the_answer(dataset):
    splits = dataset.load()
    for problem in (*splits.train, *splits.test):
        lines = problem.solution.split("\n")
        assert lines[-1] == f"#### {problem.answer}"
        worked = WORKED.findall(problem.solution)
        for left, operator, right, result, repeated in worked:
            assert result == repeated
            assert str(Equation(int(left), operator, int(right))) == f"{left}{operator}{right}={result}"
            assert 1 <= int(result) <= LARGEST_VALUE
        assert problem.answer in (worked[-1][3] if worked else lines[0])


def test_a_story_carries_each_result_into_its_next_line():
    for problem in STORIES.load().test:
        worked = WORKED.findall(problem.solution)
        assert problem.question.split()[2] == worked[0][0]
        assert [line[3] for line in worked[:-1]] == [line[0] for line in worked[1:]]
        assert STORIES.steps_min <= len(worked) <= STORIES.steps_max


@pytest.mark.slow
def test_ids_are_unique_over_all_splits():
    splits = STORIES.load()
    ids = [problem.id for problem in (*splits.train, *splits.validation, *splits.test)]
    assert len(set(ids)) == len(ids)


@pytest.mark.slow
def test_known_share_says_how_many_problems_have_no_new_word():
    for share in (0.0, 1.0):
        test = replace(STORIES, known_share=share).load().test
        assert all((NEW_WORDS.search(problem.question) is None) == (share == 1.0) for problem in test)
    test = STORIES.load().test
    known = sum(NEW_WORDS.search(problem.question) is None for problem in test) / len(test)
    assert known == pytest.approx(STORIES.known_share, abs=0.08)


@pytest.mark.slow
def test_every_new_wording_is_taught_and_tested():
    splits = STORIES.load()
    for wording in NEW_WORDINGS:
        words = next(iter(NEW_WORDS.findall(wording.sentence)))
        assert sum(words in problem.question for problem in splits.train) >= 40
        assert sum(words in problem.question for problem in splits.test) >= 10


def test_no_known_wording_holds_a_new_word():
    assert not any(NEW_WORDS.search(wording.sentence) for wording in KNOWN_WORDINGS)


def test_wordings_whose_numbers_cannot_work_out_are_no_story():
    third = next(wording for wording in NEW_WORDINGS if "third" in wording.sentence)
    dozen_less = next(wording for wording in NEW_WORDINGS if "loses a dozen" in wording.sentence)
    assert draw_story(Random(0), [third, third, third, dozen_less]) is None


def test_the_split_of_an_exercise_depends_on_its_key_alone():
    assert split_of("story 12 +3") == split_of("story 12 +3")
    shares = [split_of(f"story {i} +3") for i in range(5000)]
    assert shares.count("test") / 5000 == pytest.approx(0.1, abs=0.02)
    assert shares.count("validation") / 5000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.slow
def test_more_problems_than_there_are_is_an_error_that_says_what_to_lower():
    with pytest.raises(DataError, match=r"lower dataset\.test_problems"):
        replace(STORIES, steps_max=1, train_problems=0, validation_problems=0, test_problems=200).load()


def test_a_reversed_range_of_steps_is_an_error():
    with pytest.raises(DataError, match=r"dataset\.steps_min is 3, above dataset\.steps_max \(2\)"):
        replace(STORIES, steps_min=3, steps_max=2).load()
