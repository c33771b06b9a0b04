"""What a model writes and what a stranger's run folder says: answers, the screen, chat templates, run folders."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from rich.console import Console

from fuzzing.lines import ACTIVE, ODD_VALUES, run
from fuzzing.recipes import SNIPPETS, bomb, trees
from fuzzing.world import in_lines
from opsd_cli.data.answer_forms import form_of
from opsd_cli.data.answer_marks import marked_answer
from opsd_cli.data.answers import AnswerChecker
from opsd_cli.data.chat import ChatFormat, Mode
from opsd_cli.data.contexts import Context
from opsd_cli.data.stated_answers import find_answer
from opsd_cli.insight.samples import SampleRollout, Token
from opsd_cli.run.events import EVENTS, METRICS, read_events
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.summary import summarise
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.settings.config import ContextSettings
from opsd_cli.settings.errors import ConfigError
from opsd_cli.ui.closing import evaluation_table
from opsd_cli.ui.display import lines_of
from opsd_cli.ui.fleet import Fleet, FleetScreen
from opsd_cli.ui.frame import frame, lasting_line
from opsd_cli.ui.theme import STYLES, print_line
from opsd_cli.ui.view import RunView

PIECES = (
    "#### ", "\n#### 7\n", "\\boxed{", "{", "}", "\\frac{1}{2}", "\\sqrt{", "^", "**", "9", "10**10**10",
    "9^{9^{9^{9}}}", "!", "x=", ",", "%", "\\$", "1,000", "\\text{", "\\left(", "\\infty", "\\int_0^{10^{9}}",
    "\\begin{matrix}", "&", "\\\\", "2^{100000}", "(1,2)", "[/INST]", "\x1b[31m", "\x1b]0;x\x07", "\x9b2J", "\u202e",
    "\r", "</script><script>", "[bold]", "[/]", "{{question}}", "${oc.env:HOME}", "\0", "é", "<|im_end|>", "'; --",
    "%s%n", "$" * 40, "{" * 300, "}" * 300, "\\boxed{" * 60, "9" * 900, "(" * 200, "\\frac{" * 50, "1/0", "0^{0}",
    "-",
)  # fmt: skip
written = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join) | st.text(max_size=200)
golds = (
    st.sampled_from(("7", "\\frac{1}{2}", "x^2", "blue", "10**10**10", "(1,2)", "", "1/0", "50%", "9^{9^9}")) | written
)


@cache
def checker() -> AnswerChecker:
    """One for all cases; it never gives up on its dataset."""
    return AnswerChecker(seconds=2.0, max_error_share=2.0)


def check_answer(case: tuple[str, str]) -> None:
    """Every completion gets a grade, within the limit; only what was compared can be right."""
    completion, gold = case
    find_answer(completion, form_of(gold))
    marked_answer(gold)
    counts = checker().counts
    before = counts.unreadable + counts.timeouts + counts.errors
    (grade,) = checker().grade([(completion, (gold,))])
    assert counts.unreadable + counts.timeouts + counts.errors == before or not grade.correct


numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from(("nan", "inf", "-inf", "x", None, True)), st.just(2**70)
)
anything = trees | numbers | written


@st.composite
def events(draw: st.DrawFn) -> dict[str, Any]:
    """An event of a known kind: its fields as they should be, or anything."""
    kind = draw(st.sampled_from((*EVENTS, "other")))
    fields = EVENTS.get(kind, ())
    event: dict[str, Any] = {"kind": kind, "time": draw(numbers)}
    event |= {name: draw(numbers if draw(st.booleans()) else anything) for name in sorted(fields)}
    if kind == "step" and draw(st.booleans()):
        event["metrics"] = draw(st.dictionaries(st.sampled_from(tuple(METRICS)), numbers, max_size=4))
    return event


event_lines = st.lists(
    events().map(lambda e: json.dumps(e, default=str, skipkeys=True).encode())
    | st.binary(max_size=12)
    | st.integers(1, 100_000).map(lambda n: b"[" * n),
    max_size=6,
).map(b"\n".join)
screens = st.tuples(event_lines, st.integers(1, 120), st.booleans(), written)


def check_screen(case: tuple[bytes, int, bool, str]) -> None:
    """Whatever an events file holds, it is drawn, and no control character reaches the terminal."""
    content, width, unicode, name = case
    path = Path("events.jsonl")
    path.write_bytes(content + b"\n")
    view, drawn = RunView(settings={"eval.every": width, "checkpoint.every": name, "guard.action": name}), io.StringIO()
    sample = SampleRollout(width, name, name, name, name, None, name, (Token(name, 0.5), Token(f"{name}\n", None)))
    height = 1 + width % 40
    console = Console(file=drawn, width=width, theme=STYLES, force_terminal=False, color_system=None)
    for event in read_events(path):
        view.apply(event)
        for line in lines_of(event, view):
            console.out(line, highlight=False)
        if text := lasting_line(event):
            print_line(console, text, fold=True)
        lines = frame(
            view, name=name, width=width, height=height, now=9.0, unicode=unicode, began=0.0, place=name, sample=sample
        )
        assert len(lines.plain.splitlines()) <= height
        print_line(console, lines)
    fleet = Fleet(lambda: [(name, Path())], title=name, sweep=Path())
    fleet.look()
    for line in FleetScreen(fleet).lines(width, height, unicode):
        print_line(console, line)
    console.print(evaluation_table(view.evaluations))
    summarise(read_events(path), command={})
    assert not ACTIVE.search(drawn.getvalue()), drawn.getvalue()
    assert not ACTIVE.search(escape_controls(name))


JINJA = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ messages[0].content }}",
    "{% if add_generation_prompt %}<a>{% endif %}", "{{ ''.__class__.__mro__ }}",
    "{{ self._TemplateReference__context }}", "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}", "{% include '/etc/passwd' %}", "{% import 'os' as o %}",
    "{{ raise_exception('no') }}", "{{ 'x' * 10**9 }}", "{{ range(10**9)|list }}", "{{ 1/0 }}",
    "{% set ns = namespace(x=1) %}", "{{ messages.append(1) }}", "{{ strftime_now('%Y') }}", "{{ m | tojson }}", "{%",
    "{{", "}}", "{# x", "\x1b[31m", "x", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% generation %}",
    "{{ (9**9**9)|string|length }}",
)  # fmt: skip
templates = st.lists(st.sampled_from(JINJA) | st.text(max_size=4), max_size=6).map("".join)


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    import opsd_cli

    return AutoTokenizer.from_pretrained(Path(opsd_cli.__file__).parent / "assets" / "tiny")


def check_template(template: str) -> None:
    """A chat template renders, or is refused with one line; a context's template as well."""
    settings = ContextSettings(
        name="mine", student="{{question}}", teacher=template, teacher_system=None, control="none",
        for_both=(), sibling="correct", verdicts="reference", write=None, write_tokens=9,
    )  # fmt: skip
    with contextlib.suppress(ConfigError):
        in_lines(lambda: Context(settings))
    tokenizer().chat_template = template or " "
    chat = in_lines(lambda: ChatFormat(tokenizer(), system=None))
    try:
        chat.prompt_ids(["what is 1 + 1?"], mode=Mode(thinking=False))
        chat.ending(mode=Mode(thinking=True))
    finally:
        chat.close()


FROZEN = ("config.yaml", "command.json", "events.jsonl", "summary.json")
scraps = st.one_of(
    trees.map(lambda t: yaml.dump(t).encode()),
    st.sampled_from(SNIPPETS).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.integers(1, 40).map(lambda n: bomb(n).encode()),
    st.integers(1, 100_000).map(lambda n: b"[" * n),
    trees.map(lambda t: json.dumps(t, default=str, skipkeys=True).encode()),
    st.sampled_from(ODD_VALUES).map(lambda v: f"run: {{name: {v}}}\ncwd: {v}".encode("utf-8", "surrogatepass")),
    event_lines,
    st.binary(max_size=30),
)
folders = st.tuples(
    st.sampled_from(("watch", "resume", "eval")),
    st.dictionaries(st.sampled_from(FROZEN), scraps, max_size=4),
    st.booleans(),
)


def check_folder(case: tuple[str, dict[str, bytes], bool]) -> None:
    """A stranger's run folder is shown, or refused in plain lines. Its config lacks sections, so no rank starts."""
    command, files, has_model = case
    folder = RunFolder(Path("runs") / "mine")
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)
    for name, content in files.items():
        (folder.path / name).write_bytes(content)
    if has_model:
        folder.model.mkdir()
        (folder.model / "config.json").write_text("{}")
    argv = {"watch": ["watch"], "resume": ["train", "--resume"], "eval": ["eval"]}[command]
    rest = ["eval.problems=0"] if command == "eval" else []
    code, _, said = run([*argv, "runs/mine", *rest])
    assert code in (0, 2, 3, 4), (code, said)
