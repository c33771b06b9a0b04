"""Context templates and controls: what each role is shown, word for word."""

from __future__ import annotations

from typing import Any

import pytest
from dataset_support import gsm8k, needs_gsm8k
from hypothesis import given
from hypothesis import strategies as st

from opsd_cli.data.answer_forms import grade_exactly
from opsd_cli.data.contexts import Context, Privileged
from opsd_cli.data.privileged import feedback_of
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.data.stated_answers import find_answer
from opsd_cli.settings.config import ContextSettings
from opsd_cli.settings.errors import ConfigError, DataError

BRIDGE = "Understand the reference solution, then solve the problem yourself, in your own words."
STUDENT = "{{question}}\n\n{{instruction}}"
TEACHER = "{{question}}\n\nReference solution:\n{{solution}}\n\n" + BRIDGE + "\n\n{{instruction}}"

CLIPS = Problem(
    id="train-00001",
    question="How many clips?",
    solution="She sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips altogether.\n#### 72",
    answer="72",
)


def context(**changes: Any) -> Context:
    values: dict[str, Any] = {
        "name": "solution",
        "student": STUDENT,
        "teacher": TEACHER,
        "teacher_system": None,
        "control": "none",
        "for_both": (),
        "sibling": "correct",
        "verdicts": "reference",
        "write": None,
        "write_tokens": 9,
    }
    return Context(ContextSettings(**{**values, **changes}))


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{i}", f"q{i}", f"step one\nso it is {i}.\n#### {i}", str(i)) for i in range(count)]


def own(problem: Problem) -> Privileged:
    return Privileged(problem.solution, problem.answer)


def test_an_empty_instruction_leaves_no_paragraph_behind() -> None:
    assert context().student_text(CLIPS, instruction="") == "How many clips?"
    assert context().teacher_text(CLIPS, instruction="", shown=own(CLIPS)) == (
        f"How many clips?\n\nReference solution:\n{CLIPS.solution}\n\n{BRIDGE}"
    )


def test_the_instruction_ends_both_messages() -> None:
    assert context().student_text(CLIPS, instruction="Think.") == "How many clips?\n\nThink."
    assert context().teacher_text(CLIPS, instruction="Think.", shown=own(CLIPS)).endswith(f"{BRIDGE}\n\nThink.")


@given(st.text(min_size=1).filter(lambda text: bool(text.strip())), st.text())
def test_values_go_in_literally_and_are_never_looked_at_for_placeholders(question: str, solution: str) -> None:
    hostile = Problem("1", question + " {{solution}} {question} %s \\boxed{}", solution + "{{answer}}", "secret")
    assert context().student_text(hostile, instruction="{{solution}}") == hostile.question + "\n\n{{solution}}"
    assert hostile.solution in context().teacher_text(hostile, instruction="", shown=own(hostile))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"student": "{{question}} {{solution}}"},
            "context.student holds {{solution}}, which only the teacher may see",
        ),
        ({"student": "{{question}} {{answer}}"}, "context.student holds {{answer}}, which only the teacher may see"),
        ({"teacher": "{{question}} {{solutoin}}"}, "unknown placeholder {{solutoin}} - did you mean 'solution'?"),
        ({"teacher": "{{question}} {{ answer }}"}, "unknown placeholder {{ answer }} - did you mean 'answer'?"),
        ({"teacher": "{{question.__class__}}"}, "unknown placeholder {{question.__class__}}"),
        ({"teacher": "{{solution}}"}, "context.teacher does not show {{question}}"),
        ({"teacher": STUDENT, "control": "shuffled"}, "context.control=shuffled needs {{solution}} or {{answer}}"),
        ({"teacher": STUDENT + "{{answer}}", "control": "first_step"}, "first_step needs {{solution}}"),
    ],
    ids=range(8),
)
def test_a_template_that_cannot_be_used_is_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        context(**change)
    assert said in str(caught.value)


def test_all_problems_of_both_kinds_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        context(student="{{solution}} {{x}}")
    assert len(caught.value.problems) == 3


def test_the_context_none_shows_both_roles_the_same() -> None:
    same = context(name="none", teacher=STUDENT)
    assert same.student_text(CLIPS, instruction="Think.") == same.teacher_text(
        CLIPS, instruction="Think.", shown=own(CLIPS)
    )


def test_without_a_control_every_teacher_sees_its_own_solution() -> None:
    assert context().privileged(problems(3), seed=0) == [own(problem) for problem in problems(3)]


@given(st.integers(2, 40), st.integers(0, 1000))
def test_shuffled_shows_every_solution_once_and_nobody_their_own(count: int, seed: int) -> None:
    shown = context(control="shuffled").privileged(problems(count), seed=seed)
    assert all(privileged != own(problem) for privileged, problem in zip(shown, problems(count), strict=True))
    assert sorted(p.answer for p in shown) == sorted(str(i) for i in range(count))
    assert shown == context(control="shuffled").privileged(problems(count), seed=seed)


def test_another_seed_shuffles_otherwise_and_one_problem_cannot_be_shuffled() -> None:
    shuffled = context(control="shuffled")
    assert shuffled.privileged(problems(20), seed=0) != shuffled.privileged(problems(20), seed=1)
    with pytest.raises(DataError, match="at least two problems"):
        shuffled.privileged(problems(1), seed=0)


def test_parts_of_a_solution_withhold_the_answer() -> None:
    first = context(control="first_step").privileged([CLIPS], seed=0)
    most = context(control="all_but_last").privileged([CLIPS], seed=0)
    assert first == most == [Privileged("She sold 48/2 = 24 clips in May.", "")]


def test_a_wrong_solution_is_the_same_but_for_the_answer() -> None:
    shown = context(control="wrong").privileged([CLIPS, *problems(3)], seed=0)[0]
    assert shown.answer != "72"
    assert "72" not in shown.solution
    assert shown.solution == CLIPS.solution.replace("72", shown.answer)


def test_a_wrong_answer_that_is_no_number_comes_from_another_problem() -> None:
    paris = Problem("a", "q", "It is the largest city.\nSo it is Paris.", "Paris")
    rome = Problem("b", "q", r"thus \boxed{Rome}", "Rome")
    shown = context(control="wrong").privileged([paris, rome], seed=0)
    assert [privileged.answer for privileged in shown] == ["Rome", "Paris"]
    assert shown[0].solution == "It is the largest city.\nSo it is Rome."
    assert shown[1].solution == r"thus \boxed{Paris}"


def test_a_solution_that_does_not_state_its_answer_is_made_wrong_all_the_same() -> None:
    odd = Problem("a", "q", "Half of it.", "12")
    shown = context(control="wrong").privileged([odd, CLIPS], seed=0)[0]
    assert shown.solution == f"Half of it.\nThe answer is {shown.answer}."


@needs_gsm8k
@pytest.mark.slow
def test_every_wrong_solution_of_gsm8k_is_wrong() -> None:
    train = gsm8k(validation_problems=0).load().train
    for problem, shown in zip(train, context(control="wrong").privileged(train, seed=0), strict=True):
        stated = find_answer(shown.solution, "number")
        assert stated is not None
        assert grade_exactly(stated, problem.answer) is False


def rollouts_of(
    *texts: str, correct: list[bool], problems: list[Problem] | None = None, finish: Any = "stop"
) -> list[Privileged]:
    problems = problems or [CLIPS] * len(texts)
    rollouts = [Rollout(PromptPair(problem, (1,), (2,)), (3,), finish, ()) for problem in problems]
    return feedback_of(rollouts, correct, texts)


def test_a_rollout_is_shown_the_first_correct_sibling_and_never_itself() -> None:
    shown = rollouts_of("right A", "wrong #### 3", "right B", correct=[True, False, True])
    assert [privileged.sibling for privileged in shown] == ["right B", "right A", "right A"]
    assert [privileged.feedback for privileged in shown] == ["", "", ""]


def test_without_a_correct_sibling_the_attempt_is_told_what_is_wrong_with_it() -> None:
    shown = rollouts_of("so #### 3", "no number here", correct=[False, False])
    assert [privileged.sibling for privileged in shown] == ["", ""]
    assert shown[0].feedback == "The attempt's final answer, 3, is not correct."
    assert shown[1].feedback == "The attempt gave no final answer."
    assert "cut off" in rollouts_of("so 3", correct=[False], finish="length")[0].feedback


def test_the_only_correct_rollout_and_other_problems_give_nothing() -> None:
    other = Problem(id="other", question="?", solution="s", answer="1")
    shown = rollouts_of("right", "right", correct=[True, True], problems=[CLIPS, other])
    assert [(privileged.sibling, privileged.feedback) for privileged in shown] == [("", ""), ("", "")]


def test_thinking_is_taken_out_of_a_sibling_even_without_its_opening_tag() -> None:
    shown = rollouts_of("let me see</think>\n\nIt is 72.", "wrong", correct=[True, False])
    assert shown[1].sibling == "It is 72."


def test_a_paragraph_about_something_sampled_disappears_where_there_is_none() -> None:
    made = context(teacher="{{question}}\n\nSolution:\n{{sibling}}\n\nFeedback:\n{{feedback}}\n\nSolve it.")
    assert made.is_sampled
    text = made.teacher_text(CLIPS, instruction="", shown=Privileged("s", "a", feedback="It is wrong."))
    assert text == "How many clips?\n\nFeedback:\nIt is wrong.\n\nSolve it."


def test_a_system_message_of_the_teachers_own_is_a_template_too() -> None:
    made = context(teacher_system="The answer is {{answer}}.")
    assert made.system_text(CLIPS, instruction="", shown=Privileged("s", "72")) == "The answer is 72."
    with pytest.raises(ConfigError, match="teacher_system: unknown placeholder"):
        context(teacher_system="{{anser}}")


def test_a_problem_that_a_step_sees_twice_has_the_same_siblings_on_one_rank_and_on_two():
    pair = PromptPair(CLIPS, (1,), (2,))
    rollouts = [Rollout(pair, (3,), "stop", (), place) for place in (7, 7, 8, 8)]
    correct, texts = [False, True, True, False], ["a", "b", "c", "d"]
    on_one = feedback_of(rollouts, correct, texts)
    on_two = [feedback_of(rollouts[i:j], correct[i:j], texts[i:j]) for i, j in ((0, 2), (2, 4))]
    assert on_one == on_two[0] + on_two[1]
    assert [shown.sibling for shown in on_one] == ["b", "", "", "c"]


# Columns, siblings, verdicts ------------------------------------------------------------------------------------------

HINTED = Problem("p", "q", "s\n#### 1", "1", columns=(("hint", "Add {{solution}}."), ("meta.topic", "sums")))


def test_a_column_is_shown_to_the_teacher_alone_and_is_never_searched_for_placeholders() -> None:
    made = context(teacher="{{question}}\n\nHint: {{row.hint}}")
    assert made.columns == ("hint",)
    (shown,) = made.privileged([HINTED], seed=0)
    assert made.teacher_text(HINTED, instruction="", shown=shown) == "q\n\nHint: Add {{solution}}."
    assert made.student_text(HINTED, instruction="") == "q"
    with pytest.raises(ConfigError, match=r"only the teacher may see.*context\.for_both=\[hint\]"):
        context(student="{{question}} {{row.hint}}")


def test_a_column_for_both_is_shown_to_both_also_where_a_control_takes_another_problem() -> None:
    made = context(
        student="{{question}} ({{row.meta.topic}})",
        teacher="{{question}} ({{row.meta.topic}})\n\n{{row.hint}}",
        for_both=("meta.topic",),
        control="shuffled",
    )
    other = Problem("r", "r", "t", "2", columns=(("hint", "Halve it."), ("meta.topic", "halves")))
    shown = made.privileged([HINTED, other], seed=0)
    assert made.student_text(HINTED, instruction="") == "q (sums)"
    assert made.teacher_text(HINTED, instruction="", shown=shown[0]) == "q (sums)\n\nHalve it."


@pytest.mark.parametrize("control", ["wrong", "first_step", "all_but_last"])
def test_a_control_that_would_leave_a_column_as_written_is_refused(control: str) -> None:
    with pytest.raises(ConfigError, match=r"would still show {{row\.hint}}"):
        context(teacher="{{question}} {{solution}} {{row.hint}}", control=control)


def family(*texts: str, cut: tuple[int, ...] = ()) -> list[Rollout]:
    prompt = PromptPair(CLIPS, (1,), (1,))
    return [
        Rollout(prompt, (5,) * len(text), "length" if number in cut else "stop", (), 0, number)
        for number, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("sibling", "chosen"),
    [
        ("correct", [2, 2, 3, 2]),
        ("any", [1, 0, 0, 0]),
        ("majority", [1, 0, 0, 0]),
        ("shortest", [3, 3, 3, 2]),
        ("longest", [2, 2, 3, 2]),
    ],
)
def test_a_sibling_is_chosen_as_the_context_says(sibling: str, chosen: list[int]) -> None:
    texts = ["It is 7.", "So 7", "altogether that makes 72", "It is 72"]
    made = context(teacher="{{question}}\n\n{{sibling}}", sibling=sibling)
    each = made.privileged_of(family(*texts), [False, False, True, True], texts)
    assert [shown and shown.sibling for shown in each] == [texts[index] for index in chosen]


def test_verdicts_of_the_majority_do_not_look_at_the_reference() -> None:
    texts = ["#### 7", "It is 7.0", "#### 72", "nothing"]
    graded = [False, False, True, False]
    judge = {name: context(verdicts=name).verdicts_on for name in ("reference", "majority", "none")}
    assert judge["reference"](family(*texts), graded, texts) == graded
    assert judge["majority"](family(*texts), graded, texts) == [True, True, False, False]
    assert judge["none"](family(*texts), graded, texts) == [True] * 4
    apart = ["#### 1", "#### 2", "no", "no"]
    assert judge["majority"](family(*apart), graded, apart) == [False] * 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"verdicts": "none", "teacher": "{{question}} {{feedback}}"}, "which context.verdicts=none cannot tell"),
        ({"sibling": "any"}, "shows none"),
        ({"write": "Of {{attempt}}: what?"}, "set both, or neither"),
        ({"teacher": "{{question}} {{written}}"}, "set both, or neither"),
        ({"teacher": "{{question}} {{written}}", "write": "{{atempt}}"}, "did you mean 'attempt'"),
        (
            {"teacher": "{{question}} {{written}} {{attempt}}", "write": "{{attempt}}"},
            "unknown placeholder {{attempt}}",
        ),
    ],
)
def test_a_choice_that_the_context_does_not_use_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        context(**changes)


def test_the_policy_is_asked_about_its_own_attempt_and_only_the_teacher_reads_what_it_wrote() -> None:
    made = context(teacher="{{question}}\n\nNote: {{written}}", write="{{attempt}}\n\nTruth: {{answer}} {{row.hint}}")
    assert made.is_sampled
    assert made.columns == ("hint",)
    rollouts = family("72 it is", "no")
    (shown, silent) = made.privileged_of(rollouts, [True, False], ["72 it is", "no"], ["{{solution}}", ""])
    assert made.teacher_text(CLIPS, instruction="", shown=shown) == "How many clips?\n\nNote: {{solution}}"
    assert silent is None
    problem = Problem("p", "q", "s", "5", columns=(("hint", "Add."),))
    rollout = Rollout(PromptPair(problem, (1,), (1,)), (5,), "stop", ())
    assert made.requests([rollout], [False], ["I say {{answer}}"]) == ["I say {{answer}}\n\nTruth: 5 Add."]
