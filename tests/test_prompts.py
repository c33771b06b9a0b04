"""Problems as token ids: chat templates of every temper, the length policy, and how prompts end."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prompt_support import (
    DROPS_SYSTEM,
    LONG,
    NO_SYSTEM,
    SHORT,
    STUDENT,
    TEACHER,
    THINKING,
    TINY,
    TURNS,
    MakeRenderer,
    prompt_settings,
)
from transformers import AutoTokenizer, GenerationConfig

from opsd_cli.data.chat import end_ids
from opsd_cli.data.contexts import Context
from opsd_cli.data.privileged import CUT_MARK, cut_middle
from opsd_cli.data.problems import Problem, Rollout
from opsd_cli.data.prompts import PromptRenderer
from opsd_cli.settings.config import ContextSettings
from opsd_cli.settings.errors import DataError

pytestmark = pytest.mark.slow
pytest_plugins = ["prompt_support"]

CHOICES: dict[str, Any] = {
    "for_both": (),
    "sibling": "correct",
    "verdicts": "reference",
    "write": None,
    "write_tokens": 9,
}


def refusal(make: MakeRenderer, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        make(**changes).render([SHORT], seed=0)
    return str(caught.value)


def test_a_problem_is_rendered_twice_in_the_models_own_format(make: MakeRenderer, tokenizer: Any) -> None:
    pairs, report = make(instruction="Think.").render([SHORT], seed=0)
    assert tokenizer.decode(pairs[0].student_ids) == "<|user|>What is one and one?\n\nThink.<|end|><|assistant|>"
    assert tokenizer.decode(pairs[0].teacher_ids) == (
        "<|user|>What is one and one?\n\nReference solution:\nOne and one is 2.\n#### 2\n\nIn your own words."
        "\n\nThink.<|end|><|assistant|>"
    )
    assert (report.kept, report.dropped_long, report.shortened) == (1, 0, 0)
    assert report.student.longest == len(pairs[0].student_ids)


def test_prompts_are_what_transformers_itself_makes_of_the_messages(make: MakeRenderer, tokenizer: Any) -> None:
    renderer = make(system="Be brief.", template=THINKING, student_thinking=True, teacher_thinking=True)
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SHORT.question}],
        chat_template=THINKING,
        add_generation_prompt=True,
        return_dict=False,
        enable_thinking=True,
    )
    assert list(renderer.render([SHORT], seed=0)[0][0].student_ids) == expected


def test_earlier_turns_of_a_conversation_are_in_both_prompts(make: MakeRenderer, tokenizer: Any) -> None:
    said = [("user", "Are you there?"), ("assistant", "Yes.")]
    renderer = make(template=TURNS)
    problem = replace(SHORT, earlier=tuple(said), system="Be brief.")
    (pair,) = renderer.render([problem], seed=0)[0]
    (shown,) = renderer.context.privileged([problem], seed=0)
    teacher = renderer.context.teacher_text(problem, instruction=renderer.instruction, shown=shown)
    messages = [{"role": role, "content": text} for role, text in [("system", "Be brief."), *said]]
    for ids, text in ((pair.student_ids, SHORT.question), (pair.teacher_ids, teacher)):
        messages += [{"role": "user", "content": text}]
        options = {"chat_template": TURNS, "add_generation_prompt": True, "return_dict": False}
        assert list(ids) == tokenizer.apply_chat_template(messages, **options)
        messages.pop()


def test_a_template_without_a_thinking_mode_ignores_the_switch(make: MakeRenderer) -> None:
    thinking = make(student_thinking=True).render([SHORT], seed=0)[0]
    assert thinking == make().render([SHORT], seed=0)[0]


def test_different_endings_are_an_error_that_shows_both(make: MakeRenderer) -> None:
    text = refusal(make, template=THINKING, teacher_thinking=True)
    assert r"student '<|end|>\n<|assistant|><think>\n\n</think>\n\n' = [" in text
    assert r"teacher '<|end|>\n<|assistant|>' = [1, 203, 3]" in text
    assert "prompts.allow_different_endings=true" in text


def test_different_endings_can_be_allowed(make: MakeRenderer, tokenizer: Any) -> None:
    renderer = make(template=THINKING, teacher_thinking=True, allow_different_endings=True)
    pair = renderer.render([SHORT], seed=0)[0][0]
    assert tokenizer.decode(pair.student_ids).endswith("</think>\n\n")
    assert tokenizer.decode(pair.teacher_ids).endswith("<|assistant|>")


def test_both_prompts_of_every_pair_end_in_the_same_ids(make: MakeRenderer) -> None:
    for pair in make(template=THINKING).render([SHORT, LONG], seed=0)[0]:
        assert pair.student_ids[-4:] == pair.teacher_ids[-4:]


def test_a_prompt_that_is_too_long_is_dropped_and_counted(make: MakeRenderer) -> None:
    pairs, report = make(max_tokens=100).render([SHORT, LONG, SHORT], seed=0)
    assert [pair.problem.id for pair in pairs] == ["p1", "p1"]
    assert (report.kept, report.dropped_long, report.shortened) == (2, 1, 0)
    assert report.teacher.longest > 100 >= report.teacher.p50


def test_too_many_dropped_problems_are_an_error_with_counts_and_percentiles(make: MakeRenderer) -> None:
    with pytest.raises(DataError) as caught:
        make(max_tokens=100, max_dropped_share=0.3).render([SHORT, LONG, LONG], seed=0)
    text = str(caught.value)
    assert text.startswith("2 of 3 problems (66.7%) are longer than prompts.max_tokens=100")
    assert "p50" in text
    assert "p99" in text
    assert "prompts.overflow=shorten" in text


def test_nothing_left_is_an_error_whatever_share_is_allowed(make: MakeRenderer) -> None:
    with pytest.raises(DataError, match="1 of 1 problems"):
        make(max_tokens=100).render([LONG], seed=0)


def test_shortening_takes_the_middle_of_the_solution_and_nothing_else(make: MakeRenderer, tokenizer: Any) -> None:
    pairs, report = make(max_tokens=200, overflow="shorten").render([SHORT, LONG], seed=0)
    assert (report.kept, report.dropped_long, report.shortened) == (2, 0, 1)
    text = tokenizer.decode(pairs[1].teacher_ids)
    assert text.startswith("<|user|>What is two and two?\n\nReference solution:\nStep 0 changes nothing.\nStep 1")
    assert CUT_MARK in text
    assert text.endswith("\n#### 4\n\nIn your own words.<|end|><|assistant|>")
    assert 190 < len(pairs[1].teacher_ids) <= 200


def test_a_question_that_is_too_long_is_never_cut(make: MakeRenderer) -> None:
    wordy = Problem("p3", "word " * 500, "s\n#### 1", "1")
    report = make(overflow="shorten").render([SHORT, wordy], seed=0)[1]
    assert (report.kept, report.dropped_long, report.shortened) == (1, 1, 0)


def test_a_frame_that_is_too_long_by_itself_drops_the_problem(make: MakeRenderer) -> None:
    frame = "{{question}}\n\n" + "frame " * 300 + "{{solution}}"
    report = make(overflow="shorten", teacher=TEACHER).render([SHORT, LONG], seed=0)[1]
    assert report.shortened == 1
    with pytest.raises(DataError, match="1 of 1 problems"):
        make(overflow="shorten", teacher=frame).render([LONG], seed=0)


def test_cutting_keeps_three_quarters_of_the_start_and_the_rest_of_the_end() -> None:
    assert cut_middle("abcdefghijklmnop", 8) == "abcdef" + CUT_MARK + "op"
    assert cut_middle("abcdefgh", 1) == "a" + CUT_MARK


def test_a_doubled_beginning_of_sequence_is_taken_off(tokenizer: Any) -> None:
    with_bos = AutoTokenizer.from_pretrained(TINY)
    with_bos.bos_token = "<|system|>"
    context = Context(
        ContextSettings(name="none", student=STUDENT, teacher=STUDENT, teacher_system=None, control="none", **CHOICES)
    )
    with_bos.chat_template = "{{ bos_token }}{{ bos_token }}" + THINKING
    with closing(PromptRenderer(with_bos, settings=prompt_settings(), context=context, instruction="")) as renderer:
        ids = renderer.render([SHORT], seed=0)[0][0].student_ids
    assert ids[0] == with_bos.bos_token_id
    assert ids[1] != with_bos.bos_token_id


def test_a_missing_chat_template_says_how_to_set_one(make: MakeRenderer, tokenizer: Any) -> None:
    base = AutoTokenizer.from_pretrained(TINY)
    base.chat_template = None
    context = Context(
        ContextSettings(name="none", student=STUDENT, teacher=STUDENT, teacher_system=None, control="none", **CHOICES)
    )
    with pytest.raises(DataError, match=r"has no chat template.*model\.chat_template=FILE"):
        PromptRenderer(base, settings=prompt_settings(), context=context, instruction="")


def test_a_template_that_raises_is_quoted_with_the_ways_out(make: MakeRenderer) -> None:
    text = refusal(make, template=NO_SYSTEM, system="Be brief.")
    assert "TemplateError: System role not supported" in text
    assert "prompts.system=null" in text
    assert make(template=NO_SYSTEM).render([SHORT], seed=0)[1].kept == 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (DROPS_SYSTEM, "ignores the system message; set prompts.system=null"),
        ("<|user|>hello<|end|>", "loses the user's message"),
        ("{% for m in messages %}{{ m.content", "fails: TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "fails: UndefinedError"),
    ],
    ids=range(4),
)
def test_a_template_that_loses_a_message_or_is_broken_is_refused(make: MakeRenderer, template: str, said: str) -> None:
    assert said in refusal(make, template=template, system="Be brief.")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TURNS,
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}" + TURNS,
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/opsd-was-here') }}" + TURNS,
        "{{ 'a' * 10 ** 10 }}" + TURNS,
        "{% for i in range(10 ** 9) %}{% endfor %}" + TURNS,
    ],
    ids=["attributes", "mutation", "globals", "memory", "range"],
)
def test_a_template_that_tries_tricks_is_refused(make: MakeRenderer, template: str) -> None:
    text = refusal(make, template=template)
    assert "the chat template of" in text
    assert "model.chat_template=FILE" in text
    assert not Path("/tmp/opsd-was-here").exists()


def test_a_template_that_never_ends_is_stopped(make: MakeRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsd_cli.data.chat.RENDER_SECONDS", 1.0)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    started = time.monotonic()
    assert "exceeds its limits (1 s, 1024 MiB)" in refusal(make, template=loop + TURNS)
    assert time.monotonic() - started < 10


def test_every_id_that_ends_a_completion_is_known(make: MakeRenderer, tokenizer: Any) -> None:
    assert end_ids(tokenizer, None) == (1,)
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=[7, 1, 9])) == (1, 7, 9)
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=7)) == (1, 7)
    # A base model may end its text with one token and a turn with another.
    other_end = THINKING.replace("<|end|>", "<|system|>")
    assert make(template=other_end).end_ids(None) == (1, tokenizer.convert_tokens_to_ids("<|system|>"))
    without = AutoTokenizer.from_pretrained(TINY)
    without.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        end_ids(without, None)


def test_a_written_completion_is_closed_as_the_model_would_close_it(make: MakeRenderer, tokenizer: Any) -> None:
    ids = make().encode_completion(SHORT.solution)
    assert tokenizer.decode(ids) == SHORT.solution + "<|end|>"
    assert ids[-1] == tokenizer.eos_token_id


def test_one_renderer_uses_one_child_and_leaves_none(make: MakeRenderer) -> None:
    renderer = make()
    process = renderer.chat._child._process
    renderer.render([SHORT] * 200, seed=0)
    assert renderer.chat._child._process is process
    renderer.close()
    assert process is not None
    assert process.returncode is not None


def test_a_target_made_of_two_passes_has_a_third_prompt(make: MakeRenderer, tokenizer: Any) -> None:
    problems = [SHORT, Problem("other", "What is two and two?", "Two and two is 4.\n#### 4", "4")]

    def other(kind: str) -> str:
        pairs, _ = make(other=kind).render(problems, seed=0)
        return str(tokenizer.decode(pairs[0].other_ids))

    assert other("none") == ""
    assert other("free") == "<|user|>What is one and one?<|end|><|assistant|>"
    assert "What is one and one?" in other("wrong")
    assert "Two and two is 4." in other("wrong")
    assert "One and one is 2." in other("reference_only")
    assert "What is one and one?" not in other("reference_only")


def test_the_teacher_alone_has_its_system_message(make: MakeRenderer, tokenizer: Any) -> None:
    pairs, _ = make(teacher=STUDENT, teacher_system="Check each step.").render([SHORT], seed=0)
    assert tokenizer.decode(pairs[0].student_ids) == "<|user|>What is one and one?<|end|><|assistant|>"
    assert tokenizer.decode(pairs[0].teacher_ids).startswith("<|system|>Check each step.<|end|><|user|>")


def test_feedback_rebuilds_the_teachers_prompt_and_nothing_else(make: MakeRenderer, tokenizer: Any) -> None:
    renderer = make(teacher="{{question}}\n\nA correct solution:\n{{sibling}}")
    assert renderer.needs_feedback
    pairs, _ = renderer.render([SHORT], seed=0)
    rollouts = [Rollout(pairs[0], (7,), "stop", ()), Rollout(pairs[0], (8,), "stop", ())]
    (told, alone), _ = renderer.with_feedback(rollouts, [False, True], ["3", "It is 2."])
    assert "A correct solution:\nIt is 2." in tokenizer.decode(told.prompt.teacher_ids)
    assert told.prompt.student_ids == pairs[0].student_ids
    assert alone.prompt.teacher_ids == ()
