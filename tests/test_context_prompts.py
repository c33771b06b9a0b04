"""Every context that ships as the prompts it becomes, word for word; third prompts; and prompts made of rollouts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

import opsd_cli
from opsd_cli.data.contexts import Context, check_context, second_view
from opsd_cli.data.privileged import CUT_MARK
from opsd_cli.data.problems import FinishReason, Problem, PromptPair, Rollout
from opsd_cli.data.prompts import PromptRenderer
from opsd_cli.settings.config import ContextSettings, PromptSettings
from opsd_cli.settings.errors import ConfigError, DataError
from opsd_cli.settings.recipe_files import find_folders, written_out

pytestmark = pytest.mark.slow

TINY = Path(opsd_cli.__file__).parent / "assets" / "tiny"
FILES = find_folders().files["context"]

CLIPS = Problem(
    "p1", "How many clips?", "She sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips altogether.\n#### 72", "72"
)
CAKES = Problem("p2", "How many cakes?", "He ate 2 and baked 3.\nThat makes 3-2 = 1 cake.\n#### 1", "1")
WORDY = Problem("p3", "How many rows?", "\n".join(f"Step {i} adds a row." for i in range(60)) + "\n#### 60", "60")

BRIDGE = "Understand the reference solution, then solve the problem yourself, in your own words."
STUDENT = "<|user|>How many clips?\n\nThink.<|end|><|assistant|>"


def referring_to(solution: str) -> str:
    return f"<|user|>How many clips?\n\nReference solution:\n{solution}\n\n{BRIDGE}\n\nThink.<|end|><|assistant|>"


def saying(words: str) -> str:
    return f"<|user|>How many clips?\n\n{words}\n\nThink.<|end|><|assistant|>"


GOLDEN = {
    "solution": referring_to(CLIPS.solution),
    "shuffled": referring_to(CAKES.solution),
    "wrong": referring_to(CLIPS.solution.replace("72", "81")),
    "first_step": referring_to("She sold 48/2 = 24 clips in May."),
    "all_but_last": referring_to("She sold 48/2 = 24 clips in May."),
    "none": STUDENT,
    "answer_only": saying("The answer is 72.\n\nSolve the problem yourself and show how to arrive at this answer."),
    "demonstration": saying(
        f"This is an example of a response to the question:\n{CLIPS.solution}\n\n"
        "Now answer with a response of your own."
    ),
    "concise": saying("Solve this concisely: only the steps that are needed, each in as few words as possible."),
    "system_prompt": "<|system|>Solve the problem step by step. Check each calculation before you go on, and state the "
    "final answer last.<|end|>" + STUDENT,
    "sibling": saying("Solve the original problem, in your own words."),
    "feedback": saying("Solve the original problem, in your own words."),
    "reflection": saying("Solve the problem, in your own words."),
}
"""What the teacher of CLIPS is shown before anything is sampled. A new context needs a line here."""

CORRECT_SIBLING = saying("A correct solution:\nIt is 72.\n\nSolve the original problem, in your own words.")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def context_of(name: str, **changes: Any) -> ContextSettings:
    return ContextSettings(**{**yaml.safe_load(written_out(find_folders(), "context", name)), **changes})


MakeRenderer = Callable[..., PromptRenderer]


@pytest.fixture(scope="module")
def make(tokenizer: Any) -> Iterator[MakeRenderer]:
    """Makes renderers, equal ones once (each starts a process), and closes them."""
    made: dict[str, PromptRenderer] = {}

    def renderer(
        context: str | ContextSettings,
        *,
        other: Any = "none",
        view: str | None = None,
        template: str | None = None,
        **changes: Any,
    ) -> PromptRenderer:
        prompts: dict[str, Any] = {
            "system": None, "max_tokens": 300, "overflow": "drop", "max_dropped_share": 1.0,
            "student_thinking": False, "teacher_thinking": False, "allow_different_endings": False,
            "control_tokens": "refuse", "date": None, "student_variables": (), "teacher_variables": (),
        }  # fmt: skip
        used = context_of(context) if isinstance(context, str) else context
        settings = PromptSettings(**{**prompts, **changes})
        key = repr((used, other, view, template, settings))
        if key not in made:
            own = copy.deepcopy(tokenizer)
            own.chat_template = template or tokenizer.chat_template
            made[key] = PromptRenderer(
                own, settings=settings, context=Context(used), instruction="Think.", other=other,
                view=second_view(used, view),
            )  # fmt: skip
        return made[key]

    yield renderer
    for one in made.values():
        one.close()


def test_every_context_that_ships_has_a_golden_prompt() -> None:
    assert GOLDEN.keys() == FILES.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_context_is_the_prompts_it_says(make: MakeRenderer, tokenizer: Any, name: str) -> None:
    pairs, report = make(name).render([CLIPS, CAKES], seed=0)
    assert tokenizer.decode(pairs[0].student_ids) == STUDENT
    assert tokenizer.decode(pairs[0].teacher_ids) == GOLDEN[name]
    assert pairs[0].other_ids == ()
    assert (report.kept, report.other) == (2, None)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_student_of_no_context_sees_anything_of_a_solution(make: MakeRenderer, tokenizer: Any, name: str) -> None:
    for pair in make(name).render([CLIPS, CAKES], seed=0)[0]:
        text = tokenizer.decode(pair.student_ids)
        assert not any(line in text for line in (*CLIPS.solution.split("\n"), *CAKES.solution.split("\n")))
        assert not any(answer in text for answer in (CLIPS.answer, CAKES.answer))


@pytest.mark.parametrize("placeholder", ["solution", "answer", "sibling", "feedback"])
def test_a_student_template_may_hold_nothing_privileged(placeholder: str) -> None:
    broken = context_of("solution", student="{{question}}\n\n{{" + placeholder + "}}", teacher_system="{{x}}")
    problems = check_context(broken)
    assert problems[0].startswith(f"context.student holds {{{{{placeholder}}}}}, which only the teacher may see")
    assert problems[1].startswith("context.teacher_system: unknown placeholder {{x}}")


@pytest.mark.parametrize("name", ["shuffled", "wrong", "first_step", "all_but_last"])
def test_control_arms_differ_from_the_solution_in_what_is_shown_alone(name: str) -> None:
    assert replace(context_of(name), name="solution", control="none") == context_of("solution")


@pytest.mark.parametrize("name", GOLDEN)
def test_a_context_that_ships_is_fine_and_has_its_name(name: str) -> None:
    assert check_context(context_of(name)) == []
    assert context_of(name).name == name


# --- the teacher's own system message


def test_a_system_message_of_the_teachers_own_follows_the_common_one(make: MakeRenderer, tokenizer: Any) -> None:
    context = context_of("none", teacher_system="The answer is {{answer}}.")
    pair = make(context, system="Be kind.").render([CLIPS], seed=0)[0][0]
    assert tokenizer.decode(pair.student_ids) == "<|system|>Be kind.<|end|>" + STUDENT
    assert tokenizer.decode(pair.teacher_ids) == "<|system|>Be kind.\n\nThe answer is 72.<|end|>" + STUDENT


TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TURNS.replace("%}<|{{", "%}{% if m.role != 'system' %}<|{{").replace("{% endfor", "{% endif %}{% endfor"), ""),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS,
            "no system",
        ),
        (TURNS.replace("<|assistant|>", "{% if messages | length > 1 %}!{% endif %}<|assistant|>"), "end differently"),
    ],
    ids=["ignores", "raises", "ends otherwise"],
)
def test_a_chat_template_that_cannot_carry_the_teachers_system_message_is_refused(
    make: MakeRenderer, template: str, said: str
) -> None:
    assert make("solution", template=template).render([CLIPS], seed=0)[1].kept == 1
    with pytest.raises(DataError) as caught:
        make("system_prompt", template=template)
    assert (said or "ignores the system message; set context.teacher_system=null") in str(caught.value)
    if said == "no system":
        assert "context.teacher_system=null" in str(caught.value)


# --- third prompts


def third(renderer: PromptRenderer, tokenizer: Any) -> str:
    return str(tokenizer.decode(renderer.render([CLIPS, CAKES], seed=0)[0][0].other_ids))


def test_a_free_third_prompt_is_the_students(make: MakeRenderer, tokenizer: Any) -> None:
    assert third(make("solution", other="free"), tokenizer) == STUDENT
    assert third(make("system_prompt", other="free"), tokenizer) == STUDENT


def test_a_free_third_prompt_has_the_teachers_chat_settings(make: MakeRenderer, tokenizer: Any) -> None:
    template = TURNS + "{% if enable_thinking %}<think>{% endif %}"
    thinking = {"teacher_thinking": True, "allow_different_endings": True}
    pair = make("solution", other="free", template=template, **thinking).render([CLIPS], seed=0)[0][0]
    assert tokenizer.decode(pair.other_ids) == STUDENT + "<think>"
    assert tokenizer.decode(pair.student_ids) == STUDENT


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("solution", referring_to(CAKES.solution)),
        ("first_step", referring_to("He ate 2 and baked 3.")),
        ("answer_only", GOLDEN["answer_only"].replace("72", "1")),
    ],
)
def test_a_wrong_third_prompt_shows_the_same_of_another_problem(
    make: MakeRenderer, tokenizer: Any, name: str, shown: str
) -> None:
    assert third(make(name, other="wrong"), tokenizer) == shown


def test_a_third_prompt_of_the_reference_alone_has_no_question(make: MakeRenderer, tokenizer: Any) -> None:
    expected = referring_to(CLIPS.solution).replace("How many clips?\n\n", "")
    assert third(make("solution", other="reference_only"), tokenizer) == expected
    titled = context_of("solution", teacher="The problem: {{question}}\n\nIts solution: {{solution}}")
    assert third(make(titled, other="reference_only"), tokenizer) == (
        f"<|user|>Its solution: {CLIPS.solution}<|end|><|assistant|>"
    )


def test_a_second_view_is_the_teachers_message_in_other_words(make: MakeRenderer, tokenizer: Any) -> None:
    view = "{{question}}\n\nIt is {{answer}}.\n\n{{instruction}}"
    pair = make("solution", other="view", view=view).render([CLIPS], seed=0)[0][0]
    assert tokenizer.decode(pair.teacher_ids) == referring_to(CLIPS.solution)
    assert tokenizer.decode(pair.other_ids) == STUDENT.replace("Think.", "It is 72.\n\nThink.")


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ("It is {{answer}}.", "target.view does not show {{question}}"),
        ("{{question}} {{hints}}", "target.view: unknown placeholder {{hints}}"),
        ("{{question}} {{sibling}}", "target.view shows {{sibling}}, which context.teacher must show too"),
        (context_of("solution").teacher, "target.view is context.teacher itself"),
    ],
)
def test_a_second_view_that_is_none_is_refused(view: str, said: str) -> None:
    (problem,) = check_context(context_of("solution"), other="view", view=view)
    assert said in problem


def test_third_prompts_count_in_the_length_policy(make: MakeRenderer) -> None:
    renderer = make("solution", other="wrong", max_tokens=200)
    pairs, report = renderer.render([CLIPS, CAKES, WORDY], seed=0)
    assert len(pairs) == 1  # one has the long solution in its own prompt, one in its third prompt
    assert report.dropped_long == 2
    assert "of third prompts: p50" in str(report)
    assert renderer.render([CLIPS, CAKES, WORDY], seed=0, with_other=False)[1].dropped_long == 1


def test_evaluation_needs_no_third_prompts_and_no_second_problem(make: MakeRenderer) -> None:
    renderer = make("solution", other="wrong")
    pairs, report = renderer.render([CLIPS], seed=0, with_other=False)
    assert (pairs[0].other_ids, report.other) == ((), None)
    with pytest.raises(DataError, match="at least two problems"):
        renderer.render([CLIPS], seed=0)


def test_all_three_prompts_end_alike(make: MakeRenderer) -> None:
    for other in ("free", "wrong", "reference_only"):
        for pair in make("solution", other=other).render([CLIPS, CAKES], seed=0)[0]:
            assert pair.student_ids[-2:] == pair.teacher_ids[-2:] == pair.other_ids[-2:]


def test_a_third_prompt_that_ends_otherwise_is_an_error(make: MakeRenderer) -> None:
    ends_with_question = TURNS + "{% if 'clips?' not in messages[-1].content %}!{% endif %}"
    renderer = make("solution", other="reference_only", template=ends_with_question)
    with pytest.raises(DataError, match=r"end in different ids: student .*, teacher .*, third prompt"):
        renderer.render([CLIPS], seed=0)


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("none", "free", "both passes would be identical"),
        ("concise", "wrong", "needs {{solution}} or {{answer}} in context.teacher"),
        ("sibling", "wrong", "is made of rollouts"),
        ("shuffled", "wrong", "context.control=shuffled shows a wrong one"),
        ("wrong", "wrong", "context.control=wrong shows a wrong one"),
        ("system_prompt", "reference_only", "has no reference"),
    ],
)
def test_a_third_prompt_that_makes_no_sense_is_refused(make: MakeRenderer, name: str, other: Any, said: str) -> None:
    (problem,) = check_context(context_of(name), other=other)
    assert said in problem
    assert problem.startswith(f"target.other={other} ")
    with pytest.raises(ConfigError):
        make(name, other=other)


# --- shortening


@pytest.mark.parametrize("other", ["none", "free", "wrong", "reference_only"])
def test_shortening_cuts_the_solution_and_nothing_else(make: MakeRenderer, tokenizer: Any, other: str) -> None:
    renderer = make("solution", other=other, max_tokens=200, overflow="shorten")
    pairs, report = renderer.render([WORDY, replace(WORDY, id="p4")], seed=0)
    assert (report.kept, report.shortened) == (2, 2)
    frames = {"free": 0, "none": 0}
    for pair in pairs:
        head, tail = tokenizer.decode(pair.teacher_ids).split(CUT_MARK)
        assert head.startswith("<|user|>How many rows?\n\nReference solution:\nStep 0 adds a row.")
        assert tail.endswith(f"\n#### 60\n\n{BRIDGE}\n\nThink.<|end|><|assistant|>")
        assert tokenizer.decode(pair.student_ids) == STUDENT.replace("clips", "rows")
        assert max(len(pair.teacher_ids), len(pair.other_ids)) <= 200
        assert tokenizer.decode(pair.other_ids).count(CUT_MARK) == frames.get(other, 1)


def test_a_context_without_a_solution_has_nothing_to_cut(make: MakeRenderer) -> None:
    with pytest.raises(DataError, match="1 of 1 problems"):
        make("concise", max_tokens=20, overflow="shorten").render([WORDY], seed=0)


# --- prompts made of rollouts


def rolled(pairs: Sequence[PromptPair], *, cut: Sequence[int] = ()) -> list[Rollout]:
    reason: dict[bool, FinishReason] = {True: "length", False: "stop"}
    return [Rollout(pair, (10 + i,), reason[i in cut], ()) for i, pair in enumerate(pairs)]


def told(renderer: PromptRenderer, *texts: str, correct: str, problems: str = "", cut: Sequence[int] = ()) -> list[str]:
    """The teacher's prompts of rollouts: `correct` and `problems` have one letter for each (y: right; a: CLIPS)."""
    return reported(renderer, *texts, correct=correct, problems=problems, cut=cut)[0]


def reported(
    renderer: PromptRenderer, *texts: str, correct: str, problems: str = "", cut: Sequence[int] = ()
) -> tuple[list[str], dict[str, float]]:
    """As `told`, with the counts of those without a context, with one that is too long, and with a cut one."""
    pairs = renderer.render([CLIPS, CAKES], seed=0)[0]
    rollouts = rolled([pairs["ab".index(p)] for p in problems or "a" * len(texts)], cut=cut)
    made, counts = renderer.with_feedback(rollouts, [letter == "y" for letter in correct], texts)
    for before, after in zip(rollouts, made, strict=True):
        assert (after.prompt.student_ids, after.completion_ids) == (before.prompt.student_ids, before.completion_ids)
    decode = renderer.chat.tokenizer.decode
    return [str(decode(rollout.prompt.teacher_ids)) for rollout in made], counts


def counts_of(*, without: int = 0, too_long: int = 0, shortened: int = 0) -> dict[str, float]:
    return {
        "rollout/without_context": without,
        "rollout/context_too_long": too_long,
        "rollout/context_shortened": shortened,
    }


def test_a_correct_sibling_is_shown_to_every_other_rollout_of_its_problem(make: MakeRenderer) -> None:
    renderer = make("feedback")
    assert renderer.needs_feedback
    texts = ("It is 3.", "It is 72.", "It is 9.")
    (wrong, alone, other), report = reported(renderer, *texts, correct="nyn", problems="aab")
    assert wrong == CORRECT_SIBLING
    assert alone == ""
    assert "A correct solution" not in other
    assert "The attempt's final answer, 9, is not correct." in other
    assert report == counts_of(without=1)


def test_without_a_correct_sibling_the_verifier_speaks(make: MakeRenderer) -> None:
    texts = ("#### 5", "Who knows?", "So far 12", r"\boxed{" + "x" * 99 + "}")
    heading = "Feedback on an earlier attempt of yours:\n"
    found = told(make("feedback"), *texts, correct="nnnn", cut=[2])
    said = [text.split(heading)[1].split("\n\nSolve the original")[0] for text in found]
    assert said == [
        "The attempt's final answer, 5, is not correct.",
        "The attempt gave no final answer.",
        "The attempt was cut off before it was finished.",
        "The attempt's final answer is not correct.",
    ]
    assert not any("72" in text for text in found)


def test_a_context_of_siblings_alone_masks_rollouts_without_one(make: MakeRenderer) -> None:
    renderer = make("sibling")
    assert told(renderer, "#### 5", "#### 6", correct="nn") == ["", ""]
    prompts, report = reported(renderer, "#### 5", "It is 72.", correct="ny")
    assert prompts == [CORRECT_SIBLING, ""]
    assert report == counts_of(without=1)


def test_a_context_of_verifier_text_alone_gives_it_whatever_siblings_there_are(make: MakeRenderer) -> None:
    context = context_of("feedback", teacher="{{question}}\n\n{{feedback}}\n\n{{instruction}}")
    wrong, right = told(make(context), "#### 5", "#### 72", correct="ny")
    assert "final answer, 5, is not correct" in wrong
    assert right == ""


def test_a_written_solution_beside_feedback_is_something_to_show(make: MakeRenderer) -> None:
    context = context_of("solution", teacher="{{question}}\n\nSolution:\n{{solution}}\n\nFeedback:\n{{feedback}}")
    wrong, right = told(make(context), "#### 5", "#### 72", correct="ny")
    assert "final answer, 5, is not correct" in wrong
    assert right == f"<|user|>How many clips?\n\nSolution:\n{CLIPS.solution}<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("sibling", "shown"),
    [
        ("<think>48/2, hm</think>\n\nIt is 72.", "It is 72."),
        ("48/2, hm</think>It is 72.", "It is 72."),
        ("First. <think>a</think>Then 72.<think>was that", "First. Then 72."),
        ("<think>a<think>b</think>c</think>It is 72.", "It is 72."),
    ],
)
def test_thinking_is_taken_out_of_a_sibling(make: MakeRenderer, sibling: str, shown: str) -> None:
    assert f"A correct solution:\n{shown}\n\nSolve" in told(make("sibling"), "no", sibling, correct="ny")[0]


def test_a_sibling_that_only_thinks_is_none_and_a_finished_one_comes_first(make: MakeRenderer) -> None:
    only_thinks = "<think>It is 72.</think>"
    renderer = make("sibling")
    assert told(renderer, "no", only_thinks, "It is 72.", correct="nyy")[0] == CORRECT_SIBLING
    assert told(renderer, "no", "72 72 72", "It is 72.", correct="nyy", cut=[1])[0] == CORRECT_SIBLING
    assert "72 72 72" in told(renderer, "no", "72 72 72", "It is 3.", correct="nyn", cut=[1])[0]
    assert "is not correct" in told(make("feedback"), "no 5", only_thinks, correct="ny")[0]


def test_a_sibling_is_text_and_never_a_template(make: MakeRenderer) -> None:
    hostile = "{{solution}} {question} {{ messages }} {% raise %} #### 72"
    assert f"A correct solution:\n{hostile}\n\n" in told(make("sibling"), "no", hostile, correct="ny")[0]


def test_a_sibling_that_is_too_long_masks_or_is_shortened(make: MakeRenderer) -> None:
    dropping = make("sibling", max_tokens=120)
    prompts, report = reported(dropping, "no", WORDY.solution, correct="ny")
    assert prompts == ["", ""]
    assert report == counts_of(without=2, too_long=1)
    cutting = make("sibling", max_tokens=120, overflow="shorten")
    (shortened, _), report = reported(cutting, "no", WORDY.solution, correct="ny")
    assert shortened.startswith("<|user|>How many clips?\n\nA correct solution:\nStep 0 adds a row.")
    assert shortened.endswith(
        "\n#### 60\n\nSolve the original problem, in your own words.\n\nThink.<|end|><|assistant|>"
    )
    assert CUT_MARK in shortened
    assert report == counts_of(without=1, shortened=1)


def test_third_prompts_of_rollouts_are_rebuilt_too(make: MakeRenderer, tokenizer: Any) -> None:
    for other, said in (("free", STUDENT), ("reference_only", CORRECT_SIBLING.replace("How many clips?\n\n", ""))):
        renderer = make("sibling", other=other)
        rollouts = rolled(renderer.render([CLIPS], seed=0)[0] * 2)
        made, _ = renderer.with_feedback(rollouts, [False, True], ["no", "It is 72."])
        assert tokenizer.decode(made[0].prompt.other_ids) == said
        assert made[1].prompt == replace(rollouts[1].prompt, teacher_ids=())


def test_only_a_context_made_of_rollouts_asks_for_them(make: MakeRenderer) -> None:
    assert not make("solution").needs_feedback
    assert make("sibling").with_feedback([], [], []) == ([], counts_of())


def test_a_control_does_not_go_with_rollouts() -> None:
    (problem,) = check_context(context_of("sibling", control="shuffled"))
    assert "is made of rollouts; set context.control=none" in problem
