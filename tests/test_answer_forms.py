"""Answers as people and models write them: the forms that are read, and wrong ones that must not pass for right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing

import pytest
from support import REPOSITORY

from opsd_cli.data.answers import AnswerChecker

pytestmark = pytest.mark.slow

RIGHT = [  # completion, reference
    ("#### 72", "72"),
    ("The answer is C.", "C"),
    ("C", "C"),
    ("C) Paris", "C"),
    ("**C**", "C"),
    ("(C)", "C"),
    ("Option 3, i.e. C", "C"),
    ("\\boxed{C}", "C"),
    ("\\boxed{\\text{(C)}}", "C"),
    ("I think the answer is (C) Paris.", "C) Paris"),
    ("The capital is Paris.", "C) Paris"),
    ("The answer is C, not B.", "C"),
    ("C is correct.", "C"),
    ("The correct option is **C**", "C"),
    ("Answer: C", "C"),
    ("**Answer:** C", "C"),
    ("Final answer: (c)", "C"),
    ("0 is a multiple of 2. So the answer is no.", "no"),
    ("No.", "no"),
    ("No, because it is even.", "no"),
    ("**Yes**", "yes"),
    ("The statement is true.", "true"),
    ("True", "yes"),
    ("yes", "True"),
    ("#### $9{,}500", "9500"),
    ("It is $9,500.", "$9{,}500"),
    ("12 cm^2", "12 cm^2"),
    ("The area is 12 cm\u00b2.", "12 cm^2"),
    ("so 12 square centimeters", "12 cm^2"),
    ("#### 12", "12 cm^2"),
    ("The train leaves at 5:30.", "5:30"),
    ("5:30 PM", "17:30"),
    ("at 5:30 pm", "5:30"),
    ("#### 3.5 kg", "3,5 kg"),
    ("it weighs 3,5 kg.", "3.5"),
    ("#### 1 080", "1080"),
    ("#### 1080", "1 080"),
    ("So 1 080 in total", "1080"),
    ("#### 7 (see step 2)", "7"),
    ("#### 7", "7 (see step 2)"),
    ("#### 1 1/2", "3/2"),
    ("\\boxed{1\\frac{1}{2}}", "1.5"),
    ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("It is 1\u00bd cups", "1.5"),
    ("#### 50%", "0.5"),
    ("#### 50 percent", "50"),
    ("#### 1.5e3", "1500"),
    ("#### 1.5 \\times 10^3", "1500"),
    ("It weighs 1.5 \u00d7 10^3 kg", "1500"),
    ("#### \u22125", "-5"),
    ("#### seven", "7"),
    ("The answer is March 5, 2024.", "2024-03-05"),
    ("#### 5 March 2024", "March 5, 2024"),
    ("#### 120 mm", "12 cm"),
    ("#### 50 cents", "$0.50"),
    ("**72**", "72"),
    ("The answer is **72**.", "72"),
    ("The answer is: 72 because 48+24", "72"),
    ("The final answer is $\\boxed{72}$.", "72"),
    ("Answer: 72\n\nShe sold 48 in April and 24 in May.", "72"),
    ("\\boxed{x^2+1}", "1+x^2"),
    ("The answer is x + 1.", "x+1"),
    ("\\boxed{\\{1,2\\}}", "{2,1}"),
    ("#### (1, 200)", "(1,200)"),
    ("#### x=5", "5"),
    ("\\boxed{\\textbf{(C)}\\ 5}", "5"),
    ("(C) 5", "5"),
    ("\\boxed{3,5}", "5, 3"),
    ("#### 1.234,56", "1234.56"),
    ("#### 5 dollars", "$5"),
    ("$5", "5 USD"),
    ("0.333333", "1/3"),
    ("#### The answer is 7", "7"),
    ("She has 72 clips left.", "72"),
    ("#### 90^\\circ", "90"),
    ("#### 5 km/h", "5 kilometers per hour"),
    ("#### 10 m/s", "36 km/h"),
    ("New York", "New York"),
    ("It is New York City.", "new york city"),
    ("The capital of France is Paris", "Paris"),
    ("Paris, the capital of France", "Paris"),
    ("#### 2 hours", "120 minutes"),
    ("She has $1,234.50 left", "1234.5"),
    ("A: yes", "yes"),
    ("Step 1: x. Therefore, the answer is 1,080 apples.", "1080"),
    ("#### 1080.00", "1,080"),
    ("Therefore, Natalia sold **72** clips.", "72"),
    ("x = 5 or x = -5", "\\pm 5"),
    ("\\[ x = 5 \\]", "5"),
    ("So the total is \\$1,080.", "1080"),
    ("**Final Answer**\n\n72", "72"),
    ("The final answer is: $\\frac{3}{4}$", "0.75"),
    ("The answer is 3/4.", "0.75"),
    ("Answer: B) Rome", "B"),
    ("B", "b"),
    ("(b)", "B"),
    ("The best choice is option B because it is red.", "B"),
    ("My answer: yes", "yes"),
    ("Yes, Paris is in France.", "yes"),
    ("False. The sky is blue.", "False"),
    ("#### Yes", "yes"),
    ("It would cost \u00a35", "5 pounds"),
    ("5 GBP", "\u00a35"),
    ("#### 0.05", "5%"),
    ("#### 5", "5%"),
    ("the ratio is 3:4", "3:4"),
    ("#### 3:4", "3:4"),
    ("12:00", "12:00 pm"),
    ("noon is 12:00 PM", "12:00"),
    ("The meeting is on May 5th, 2024", "5 May 2024"),
    ("72\u00a0000", "72000"),
    ("72'000", "72000"),
    ("7,3 %", "7.3%"),
    ("#### 72.", "72"),
    ("Total = 72", "72"),
    ("#### $72 (she saved $8)", "72"),
    ("\\boxed{72 \\text{ clips}}", "72"),
    ("\\boxed{\\$72}", "72"),
    ("\\boxed{72\\%}", "72"),
    ("\\boxed{\\text{yes}}", "yes"),
    ("\\boxed{\\text{Yes}}", "Yes"),
    ("the answer is \\( 72 \\)", "72"),
    ("The answer is $72$.", "72"),
    ("Hence, 3.0 liters", "3 l"),
    ("\\boxed{10\\,000}", "10000"),
    ("\\boxed{10\\ 000}", "10000"),
    ("10 000 people", "10000"),
    ("Answer: -7", "-7"),
    ("Answer: \u20137", "-7"),
    ("2/3 of the cake", "2/3"),
    ("The probability is 2/3.", "2/3"),
    ("\\dfrac23", "2/3"),
    ("it is 0.25", "1/4"),
    ("four", "4"),
    ("twenty-five", "25"),
    ("#### 3 hours", "3"),
    ("3 hrs", "3 hours"),
    ("#### 1,000,000", "1 million"),
    ("$1.2 million", "1200000"),
    ("6.02\u00d710\u00b2\u00b3", "6.02e23"),
    ("6.02 x 10^23", "6.02e23"),
    ("2,5", "2.5"),
]

WRONG = [
    ("#### 73", "72"),
    ("The answer is not C.", "C"),
    ("A or C", "C"),
    ("Either A or C", "C"),
    ("The answer is B, not C.", "C"),
    ("A) Oslo\nB) Rome\nC) Paris", "C"),
    ("C) London", "C) Paris"),
    ("Yes and no.", "yes"),
    ("The answer is not yes.", "yes"),
    ("no", "yes"),
    ("Yes. Wait, no.", "yes"),
    ("#### 7 or 8", "7"),
    ("#### 7 or 8", "8"),
    ("It is 7 or 8", "8"),
    ("It's not 7", "7"),
    ("#### 12 m^2", "12 cm^2"),
    ("#### 12 m", "12 m^2"),
    ("so it is 5 miles.", "5 km"),
    ("#### 5 km", "5 miles"),
    ("#### \u20ac5", "$5"),
    ("#### 50 cents", "$50"),
    ("#### 5:30 am", "5:30 pm"),
    ("5:30", "17:30"),
    ("#### 0.5%", "0.5"),
    ("#### 3,500", "3.5"),
    ("#### 1.080", "1080"),
    ("#### 1.5", "1 5"),
    ("#### 72 thousand", "72"),
    ("#### 5k", "5"),
    ("#### 5 million", "5"),
    ("#### 7x", "7"),
    ("#### x > 7", "7"),
    ("#### > 7", "7"),
    ("#### more than 7", "7"),
    ("at least 7", "7"),
    ("#### 2 3", "6"),
    ("#### 7 (mod 12)", "7"),
    ("#### 101 (base 2)", "101"),
    ("#### March 5, 2023", "March 5, 2024"),
    ("#### silent", "listen"),
    ("Not Paris", "Paris"),
    ("The capital is not Paris", "Paris"),
    ("Paris or London", "Paris"),
    ("Paris, London", "Paris"),
    ("#### 1/3", "0.33"),
    ("#### -5", "5"),
    ("#### 2^3", "23"),
    ("10\u00b2", "102"),
    ("#### 5:30", "1/6"),
    ("#### 9**9", "9"),
    ("#### 3-5", "3"),
    ("3\u20135", "5"),
    ("between 3 and 5", "5"),
    ("#### 7!", "7"),
    ("#### \\sqrt{7}", "7"),
    ("The answer is 7. Wait, it is 8.", "7"),
    ("", "7"),
    ("I do not know", "no"),
    ("no idea", "no"),
    ("There is no way to know", "no"),
    ("#### 5 kg", "5 m"),
    ("#### 5 hours", "5 minutes"),
    ("The answer is A", "B"),
    ("#### True", "False"),
    ("#### 1 1/2", "11/2"),
    ("#### 1\u00bd", "11/2"),
    ("#### -1/2", "1/2"),
    ("#### 7 less than x", "7"),
    ("#### 1,5", "15"),
    ("#### 3.14", "pi"),
    ("#### (1,200)", "1200"),
    ("\\boxed{72", "7"),
    ("I cannot answer C", "C"),
    ("Is it A? No, C is wrong.", "C"),
    ("#### twelve", "2"),
    ("#### 20 \u00b0C", "20 \u00b0F"),
    ("C is not correct", "C"),
    ("5 apples", "5 oranges"),
    ("#### 5 apples", "5 km"),
    ("#### $5", "5 km"),
    ("#### 7 dozen", "7"),
    ("#### 72 or so", "27"),
    ("\\boxed{7}{2}", "72"),
    ("#### 10 000", "10"),
    ("#### 1,000", "1"),
    ("yes and no", "no"),
    ("The answer could be yes or no.", "no"),
    ("The answer is either 7 or 8.", "8"),
    ("#### 0.5", "50"),
    ("#### 50", "0.5"),
    ("The answer is less than 72", "72"),
    ("The answer is more than 72.", "72"),
    ("not 5 but 6", "5"),
    ("#### 6 (not 5)", "5"),
    ("#### 12 inches", "12 feet"),
    ("#### 3 feet", "36 feet"),
    ("#### May 6", "May 5"),
    ("5:03", "5:30"),
    ("#### five", "6"),
    ("#### x=5,y=3", "5"),
    ("#### (3,5)", "3.5"),
    ("#### [1,2]", "(1,2)"),
    ("B", "C"),
    ("Answer: (A), (B)", "A"),
    ("A and B", "A"),
    ("The answer is A/B", "A"),
    ("A, B", "B"),
    ("None of the above, so not C", "C"),
    ("Paris is not the capital", "Paris"),
    ("London is better than Paris", "Paris"),
    ("#### $500", "$5.00"),
    ("#### 5%", "5 dollars"),
    ("Incorrect: 72", "27"),
    ("The answer is unknown", "no"),
    ("Nothing", "no"),
    ("#### 1e3", "13"),
    ("#### 1.0.5", "1.05"),
    ("#### 10^2", "10"),
    ("#### 10^{2}", "102"),
    ("#### \\frac{7}{2}", "7"),
    ("72 + 3", "72"),
    ("72 - 72", "72"),
    ("#### 72/2", "72"),
    ("The answer is 72/2", "72"),
    ("She has 7 apples and 8 pears", "7"),
    ("#### 1 in 5", "1"),
    ("1:5", "15"),
    ("#### 5 to 1", "5"),
    ("#### 5 minus 1", "5"),
    ("#### 5 squared", "5"),
    ("twenty", "2"),
    ("#### 3 1", "31"),
    ("#### two hundred", "2"),
    ("two hundred", "200000"),
]


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with closing(AnswerChecker(max_error_share=1.0)) as shared:
        yield shared


@pytest.mark.parametrize(("completion", "reference"), RIGHT, ids=range(len(RIGHT)))
def test_a_right_answer_is_right_however_it_is_written(checker: AnswerChecker, completion: str, reference: str) -> None:
    (grade,) = checker.grade([(completion, (reference,))])
    assert (grade.correct, grade.stated) == (True, True)


@pytest.mark.parametrize(("completion", "reference"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_answer_is_wrong_however_near_it_looks(checker: AnswerChecker, completion: str, reference: str) -> None:
    assert not checker.grade([(completion, (reference,))])[0].correct


def table_of_the_page() -> list[tuple[str, list[str], list[str]]]:
    """References with the answers that the page on data says are right and wrong."""
    page = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- answers -->")[2].partition("<!-- end -->")[0].strip().splitlines()[2:]
    cells = [[re.findall("`([^`]+)`", cell) for cell in row.replace("\\|", "\0").split("|")[2:5]] for row in rows]
    return [(reference, right, wrong) for references, right, wrong in cells for reference in references]


@pytest.mark.parametrize(("reference", "right", "wrong"), table_of_the_page())
def test_the_page_on_data_says_which_answers_are_right(
    checker: AnswerChecker, reference: str, right: list[str], wrong: list[str]
) -> None:
    assert right
    assert wrong
    for answers, expected in ((right, True), (wrong, False)):
        for answer in answers:
            assert checker.grade([(answer, (reference,))])[0].correct is expected, answer
            if "boxed" not in answer:
                assert checker.grade([(f"So I think.\n#### {answer}", (reference,))])[0].correct is expected, answer


def test_any_of_several_accepted_answers_is_right(checker: AnswerChecker) -> None:
    accepted = ("USA", "United States", "the US")
    grades = checker.grade([("The answer is the United States.", accepted), ("It is Canada.", accepted)])
    assert [grade.correct for grade in grades] == [True, False]


def test_without_a_reference_nothing_is_right_and_nothing_is_stated(checker: AnswerChecker) -> None:
    (grade,) = checker.grade([("#### 7", ())])
    assert (grade.correct, grade.stated) == (False, False)
