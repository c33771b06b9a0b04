"""A recipe's chat template and prompts looked at before a run: how texts begin and end, what limits would drop, and
whether the teacher is shown more than the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_cli.data.chat import CLOCK, opens_thinking
from opsd_cli.data.problems import Problem, PromptPair, Splits
from opsd_cli.data.prompts import PromptRenderer
from opsd_cli.engine.loading import Source, load_tokenizer
from opsd_cli.engine.model_limits import check_same_tokens, table_of
from opsd_cli.insight.findings import Findings, Level
from opsd_cli.rank.advice import about_same_prompts, prompt_warnings
from opsd_cli.rank.data_checks import check_tokens
from opsd_cli.rank.run_data import (
    generation_settings,
    make_renderer,
    plain_problems,
)
from opsd_cli.settings.config import Config
from opsd_cli.teachers.teachers import External

MOST_RENDERED = 2000  # training problems whose prompts are made
MOST_READ_BACK = 8  # prompts
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty", "min_p")


def look_at_chat(findings: Findings, config: Config, source: Source, model_config: Any) -> PromptRenderer | None:
    chat_template = config.model.chat_template
    tokenizer = findings.attempt("model", "tokenizer", lambda: load_tokenizer(source, chat_template=chat_template))
    if tokenizer is None:
        return None
    teacher = config.teacher
    if isinstance(teacher, External) and (path := teacher.path) is not None:
        findings.attempt("teacher", "tokens", lambda: check_same_tokens(source.beside(path, teacher.revision), source))
    renderer = findings.attempt("prompts", "template", lambda: make_renderer(config, tokenizer))
    if renderer is None:
        return None
    _ends(findings, renderer, generation_settings(source))
    _template(findings, config, renderer)
    rows, tokens = table_of(model_config), len(tokenizer)
    message = f"{tokens:,} tokens, a table of {rows:,} rows"
    if rows >= tokens:
        findings.add("model", "table", "ok", message)
    else:
        findings.add("model", "table", "warning", message, "the tokens beyond it must never occur")
    return renderer


def _ends(findings: Findings, renderer: PromptRenderer, generation: Any | None) -> None:
    """Which ids begin and end a text, and whether everything agrees on them."""
    tokenizer, chat = renderer.chat.tokenizer, renderer.chat
    ids = findings.attempt("model", "ends", lambda: renderer.end_ids(generation))
    if ids is None:
        return
    name = {one: repr(tokenizer.convert_ids_to_tokens(one)) for one in ids}
    known = {tokenizer.eos_token_id}
    configured = None if generation is None else generation.eos_token_id
    known |= {configured} if isinstance(configured, int) else set(configured or ())
    if not chat.closes_turns:
        findings.add(
            "model", "turn_end", "warning",
            "the chat template writes no control token after an assistant's words, so the end of a turn is the "
            f"tokenizer's {name[chat.turn_end_id]}",
            "if the model was trained with another end, use a template that writes it: model.chat_template=FILE",
        )  # fmt: skip
    elif chat.turn_end_id not in known:
        findings.add(
            "model", "turn_end", "warning",
            f"the chat template ends a turn with {name[chat.turn_end_id]}, which neither the tokenizer nor "
            "generation_config.json names as an end: other programs will run on past it",
            f"add {chat.turn_end_id} to eos_token_id in generation_config.json",
        )  # fmt: skip
    bos, pad = tokenizer.bos_token, tokenizer.pad_token
    padding = f"padding {pad!r}" + (" (an end too, which does no harm here)" if tokenizer.pad_token_id in ids else "")
    padding = padding if pad is not None else "no padding token, and none is needed"
    listed = " or ".join(f"{name[one]} ({one})" for one in ids)
    begins = f"begins with {bos!r}" if bos is not None else "no beginning-of-sequence token"
    findings.add("model", "ends", "ok", f"completions end with {listed}; {begins}; {padding}")
    if generation is not None:
        own = {key: vars(generation).get(key) for key in SAMPLING_KEYS}
        set_keys = ", ".join(f"{key}={value}" for key, value in own.items() if value not in (None, 1.0, 0, 50))
        said = f" (not used: {set_keys}; sampling.* decides)" if set_keys else ""
        findings.add("model", "generation", "ok", f"generation_config.json is read for its ends{said}")


def _template(findings: Findings, config: Config, renderer: PromptRenderer) -> None:
    """The date, the thinking, and where prompts end."""
    chat = renderer.chat
    if CLOCK in chat.template and config.prompts.date is None:
        findings.add(
            "prompts", "date", "warning",
            f"the chat template asks for the date and is told that of the run's start ({chat.date or 'today'}): "
            "prompts differ from day to day",
            "pin it: prompts.date=YYYY-MM-DD",
        )  # fmt: skip
    elif CLOCK in chat.template:
        findings.add("prompts", "date", "ok", f"the chat template asks for the date and is told {config.prompts.date}")
    endings = {"student": chat.ending(mode=renderer.student_mode), "teacher": chat.ending(mode=renderer.teacher_mode)}
    for role, ending in endings.items():
        thinks = "; it opens a block of thinking" if opens_thinking(ending) else ""
        findings.add("prompts", f"ending_{role}", "ok", f"the {role}'s prompt ends in {ending[-60:]!r}{thinks}")
    if endings["student"] != endings["teacher"]:
        findings.add(
            "prompts", "endings", "warning",
            "the two prompts end differently, so the first tokens of a completion follow different words",
            "give prompts.student_thinking and prompts.teacher_thinking one value, or leave the first tokens out "
            "(tokens=skip3)",
        )  # fmt: skip


def look_at_prompts(
    findings: Findings, config: Config, splits: Splits, renderer: PromptRenderer, source: Source, model_config: Any
) -> None:
    tokenizer = renderer.chat.tokenizer
    chosen = {"training": splits.train[:MOST_RENDERED]}
    held_out = {"validation": splits.validation, "test": splits.test}[config.eval.split][: config.eval.problems]
    chosen |= {config.eval.split: held_out} if held_out else {}
    notes = list[str]()
    plain = findings.attempt(
        "data", "control_tokens",
        lambda: plain_problems(
            config, tokenizer, notes, train=chosen["training"], held_out=held_out, retention=splits.retention
        ),
    )  # fmt: skip
    if plain is not None and notes:
        findings.add("data", "control_tokens", "warning", "; ".join(notes), "leave them out of the data if you can")
    problems = chosen if plain is None else chosen | {"training": plain["train"]}
    pairs: list[PromptPair] = []
    for name, some in problems.items():
        pairs += _lengths(findings, config, name, some, renderer)
    if not pairs:
        return
    findings.attempt("model", "unknown_tokens", lambda: check_tokens(model_config, renderer, pairs))
    _round_trip(findings, renderer, pairs[:MOST_READ_BACK])
    generation = generation_settings(source)
    vocabulary = table_of(model_config)
    odd = prompt_warnings(tokenizer, pairs[0].student_ids, vocabulary=vocabulary, generation=generation)
    for name, message in odd.items():
        findings.add("prompts", name, "warning", message)
    _privilege(findings, config, renderer, pairs)


def _lengths(
    findings: Findings, config: Config, name: str, problems: Sequence[Problem], renderer: PromptRenderer
) -> list[PromptPair]:
    """The prompts of some problems, and how many the limits would drop or cut."""
    rendered = findings.attempt(
        "prompts", "render", lambda: renderer.fitting(problems, range(len(problems)), seed=config.run.seed)
    )
    if rendered is None:
        return []
    pairs, report = rendered
    before = findings.count("error")
    findings.attempt("prompts", "lengths", lambda: report.check(config.prompts))
    if findings.count("error") == before:
        longest = max(report.student.longest, report.teacher.longest)
        level: Level = "ok"
        change = ""
        if report.dropped_long or report.shortened:
            level = "warning"
            change = f"prompts.max_tokens={longest} keeps all of them whole (now {config.prompts.max_tokens})"
        findings.add("prompts", "lengths", level, f"{name}: {report}", change)
    return [pair for pair in pairs if pair is not None]


def _round_trip(findings: Findings, renderer: PromptRenderer, pairs: Sequence[PromptPair]) -> None:
    """Whether a prompt's ids hold the question as it is written, and are made of their text again."""
    tokenizer = renderer.chat.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    lost, unlike, plain = [], 0, 0
    for pair in pairs:
        for role, ids in (("student", pair.student_ids), ("teacher", pair.teacher_ids)):
            text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if " ".join(pair.problem.question.split()) not in " ".join(text.split()):
                lost.append(f"{role} prompt of {pair.problem.id}")
            unlike += renderer.chat.encode([text])[0] != ids
            plain += special.isdisjoint(ids)
    if lost:
        findings.add(
            "prompts", "round_trip", "error",
            f"the question is not in the {lost[0]} as it is written: template or tokenizer changes it",
            "look at a prompt with opsd inspect, and use another template: model.chat_template=FILE",
        )  # fmt: skip
    elif plain:
        findings.add(
            "prompts", "round_trip", "warning",
            "prompts hold no control token, so the model cannot tell whose turn it is",
            "use the model's own chat template: model.chat_template=FILE",
        )  # fmt: skip
    elif unlike:
        message = f"{unlike} of {2 * len(pairs)} prompts become other ids when their text is tokenised again"
        change = "hand ids on, never text, to whatever else uses these prompts; opsd does"
        findings.add("prompts", "round_trip", "warning", message, change)
    else:
        findings.add(
            "prompts", "round_trip", "ok", "prompts hold the question as written, and their text gives their ids"
        )


def _privilege(findings: Findings, config: Config, renderer: PromptRenderer, pairs: Sequence[PromptPair]) -> None:
    """Whether the teacher's prompt holds more than the student's."""
    if renderer.needs_feedback:
        findings.add("teacher", "privilege", "ok", "the teacher is shown a step's rollouts; their prompts come later")
        return
    if (verdict := about_same_prompts(config, pairs)) is not None:
        same = sum(pair.student_ids == pair.teacher_ids for pair in pairs)
        level: Level = "error" if same == len(pairs) else "warning"
        findings.add("teacher", "same_prompts", level, verdict.message)
        return
    more = [len(pair.teacher_ids) - len(pair.student_ids) for pair in pairs]
    findings.add(
        "teacher", "privilege", "ok",
        f"the teacher's prompt has {sorted(more)[len(more) // 2]:,} tokens more than the student's (median)",
    )  # fmt: skip
