"""avg@k, pass@k and maj@k against enumeration, and their intervals against repeated draws."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_cli.insight.at_k import Vote, average_at, chance_of_one, ladder, majority_at, mean_of, pass_at
from opsd_cli.insight.paired import wilson_interval

GRADES = st.lists(st.booleans(), min_size=1, max_size=7)


@given(GRADES, st.integers(1, 7))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one(grades: list[bool], k: int):
    if k > len(grades):
        with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} completions"):
            chance_of_one(len(grades), sum(grades), k)
        return
    subsets = list(combinations(grades, k))
    assert chance_of_one(len(grades), sum(grades), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_one_completion_of_each_problem_gives_accuracy_and_wilsons_interval():
    right = [[index < 3] for index in range(10)]
    assert average_at(right) == pass_at(right, 1)
    found = average_at(right)
    assert (found.value, found.problems) == (0.3, 10)
    assert (found.low, found.high) == pytest.approx(wilson_interval(3, 10))


def test_the_majority_of_three_is_taken_over_answers_and_not_over_grades():
    # Two wrong completions that agree outvote a right one; two that differ do not.
    agree = [Vote(1, False), Vote(1, False), Vote(0, True)]
    differ = [Vote(1, False), Vote(2, False), Vote(0, True), Vote(0, True)]
    assert majority_at([agree], 3).value == 0.0
    assert majority_at([differ], 4).value == 1.0
    assert majority_at([differ[:3]], 3).value == pytest.approx(1 / 3)  # a tie of three
    assert majority_at([[Vote(None, False), Vote(0, True)]], 2).value == 1.0
    assert majority_at([[Vote(None, False), Vote(None, False)]], 2).value == 0.0
    assert majority_at([agree], 1).value == pytest.approx(1 / 3)


def test_the_majority_of_few_among_many_is_near_the_mean_over_all_subsets():
    votes = [Vote(0, True)] * 9 + [Vote(1, False)] * 6 + [Vote(None, False)]
    exact = [majority_at([list(some)], 5).value for some in combinations(votes, 5)]
    drawn = [majority_at([votes], 5, seed=seed).value for seed in range(20)]
    assert sum(drawn) / 20 == pytest.approx(sum(exact) / len(exact), abs=0.02)
    assert majority_at([votes], 5, seed=3) == majority_at([votes], 5, seed=3)


def test_intervals_hold_the_truth_as_often_as_they_say_though_completions_of_a_problem_agree():
    """200 evaluations of 40 problems, 8 completions each: problems are easy or hard, as in life. Counting completions
    as if they were independent would hold the truth in three of four."""
    draw, held = random.Random(1), 0
    for _ in range(200):
        chances = [draw.choice([0.05, 0.3, 0.95]) for _ in range(40)]
        found = average_at([[draw.random() < chance for _ in range(8)] for chance in chances])
        held += found.low <= (0.05 + 0.3 + 0.95) / 3 <= found.high
    assert 180 <= held <= 198


def test_values_that_are_all_alike_do_not_give_an_interval_without_width():
    found = average_at([[True, False]] * 20)
    assert found.low < 0.45 < 0.55 < found.high
    assert mean_of([1.0] * 5).low == pytest.approx(wilson_interval(5, 5)[0])


def test_k_goes_up_by_doubling_to_all():
    assert [ladder(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
