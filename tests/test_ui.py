"""The screen: drawn at every width, plain in a pipe, unharmed by hostile text, closed pipes and poor encodings."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from opsd_cli.insight.samples import SampleRollout, Token, newest_sample
from opsd_cli.run.events import EVENTS, Event, EventLog, read_events
from opsd_cli.run.folder import RunFolder, new_run_folder, write_config
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.settings.plugin_files import use_plugins, used_plugins
from opsd_cli.ui.closing import evaluation_table, next_lines, result_lines, stop_line
from opsd_cli.ui.display import LiveDisplay, lines_of
from opsd_cli.ui.frame import frame, lasting_line
from opsd_cli.ui.theme import STYLES, QuietStream, changes, count, decimal, duration, percent, plural
from opsd_cli.ui.view import RunView

HOSTILE = "a [/INST] [bold] \x1b[31mred\x1b[0m \x07 \x9b2J \u202eabc\r\n日本語 ✓"
METRICS = {
    "loss/objective": 0.4312,
    "kl/forward": 0.4312,
    "kl/reverse": 0.512,
    "agree/top1": 0.831,
    "rollout/accuracy": 0.412,
    "rollout/length_mean": 64.0,
    "rollout/truncated": 0.031,
    "time/sample": 0.6,
    "time/score": 0.2,
    "time/update": 0.2,
    "time/step": 1.0,
    "tokens/completion": 1024.0,
    "tokens/per_second": 1024.0,
    "memory/peak_gib": 1.25,
}


def view_of(events: Iterable[Event]) -> RunView:
    view = RunView()
    for event in events:
        view.apply(event)
    return view


def played(root: Path, *, steps: int = 4, done: int = 4, task: str = "train", code: int = 0) -> RunFolder:
    """A run folder as a run leaves it after `done` of `steps` steps."""
    folder = new_run_folder(root, name=f"run-{done}-{task}", hint="x")
    write_config(folder, {"optim": {"schedule": "constant"}})
    log = EventLog(folder.events)
    facts = dict.fromkeys(EVENTS["run_started"], 0)
    facts |= {"run": folder.name, "task": task, "steps": steps, "ranks": 2, "device": "cpu", "parameters": 1_050_000}
    facts |= {"trainable_parameters": 20_000, "plan": ["model tiny", f"first problem: {HOSTILE}"]}
    log.progress("loading the model")
    log.write("run_started", **facts)
    evaluate(log, 0, 24)
    compare(log, "teacher", 0, won=90, lost=2, p_value=1e-20)
    log.write("warning", message=HOSTILE)
    for step in range(1, done + 1):
        log.progress("sampling", done=3, total=16)
        log.write("step", step=step, metrics=METRICS | {"loss/objective": 1.0 / step})
    if done == steps and task == "train":
        evaluate(log, steps, 63)
        compare(log, "change", steps, won=50, lost=11, p_value=4.2e-7)
        log.write("checkpoint", step=steps, path="p", seconds=0.4)
        folder.model.mkdir()
    log.write("run_ended", outcome="stopped" if code else "completed", step=done, exit_code=code, message="")
    return folder


def evaluate(log: EventLog, step: int, correct: int) -> None:
    share = correct / 200
    facts = {"accuracy": share, "low": share - 0.05, "high": share + 0.05, "length_mean": 61.0, "truncated": 0.03}
    log.write(
        "evaluation", step=step, split="validation", role="student", problems=200, correct=correct, seconds=3.0, **facts
    )


def compare(log: EventLog, name: str, step: int, **facts: float) -> None:
    facts |= {"problems": 200, "gain": 0.19, "low": 0.12, "high": 0.27}
    log.write("comparison", name=name, step=step, since=0, split="validation", **facts)


def watch(folder: RunFolder, **options) -> subprocess.CompletedProcess:
    code = "import sys; from opsd_cli.cli import main; raise SystemExit(main(['watch', sys.argv[1]]))"
    command = [sys.executable, "-c", code, str(folder.path)]
    options = {"capture_output": True, "text": True, "timeout": 30, "check": False, **options}
    return subprocess.run(command, **options)


@pytest.mark.parametrize("width", [100, 80, 60, 40, 24])
@pytest.mark.parametrize("unicode", [True, False])
def test_no_line_of_the_frame_is_wider_than_the_terminal_and_nothing_is_lost(tmp_path, width, unicode):
    events = read_events(played(tmp_path).events)
    for seen in range(len(events) + 1):
        drawn = frame(view_of(events[:seen]), name="run", width=width, now=9.0, unicode=unicode, began=0.0).plain
        assert max(map(cell_len, drawn.splitlines())) <= width
        assert unicode or drawn.isascii()
    words = " ".join(drawn.split())
    for fact in ("step 4/4", "loss 0.2500", "KL forward 0.4312", "83.1 %", "1,024", "31.5 %", "memory 1.2 GiB"):
        assert fact in words or fact in drawn.replace("\n", "")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 24), (40, 12), (20, 6), (200, 60)])
@pytest.mark.parametrize("unicode", [True, False])
def test_the_frame_fits_every_terminal_and_what_matters_most_is_drawn(tmp_path, width, height, unicode):
    view = view_of(read_events(played(tmp_path).events)[:-5])  # before its end
    view.settings = {"guard.action": "warn"}
    sample = SampleRollout(3, "p", "", "", "", 1.0, "stop", (Token(HOSTILE * 9, 0.4), Token("\n12", 9.0)))
    drawn = frame(
        view,
        name=HOSTILE,
        width=width,
        height=height,
        now=9.0,
        unicode=unicode,
        began=0.0,
        place="runs/x",
        sample=sample,
    )
    lines = drawn.plain.splitlines()
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", drawn.plain)
    assert unicode or drawn.plain.isascii()
    if height >= 24:
        words = " ".join(drawn.plain.split())
        for fact in ("KL reverse 0.5120", "step 3/4", "1 warning: a [/INST]", "training"):
            assert fact in words
        assert ("rollout of step 3, right, 2 tokens, 9.4000 nats" in words) is (width >= 80)
        assert ("▁" in words) is unicode
    if (width, height, unicode) == (120, 40, True):
        assert "#ffffff on #b91c1c" in {str(span.style) for span in drawn.spans}, "the token that carries most"


def test_a_low_terminal_leaves_out_the_least_and_keeps_the_loss_and_the_phase(tmp_path):
    view = view_of(read_events(played(tmp_path).events)[:-5])
    drawn = frame(view, name="r", width=40, height=12, now=9.0, unicode=True, began=0.0, place="runs/x").plain
    assert "loss " in drawn
    assert "training" in drawn.splitlines()[-1]
    assert "gradient norm" not in drawn
    assert "runs/x" not in drawn


def test_the_newest_rollout_that_carries_most_is_shown_and_a_huge_line_is_passed_over(tmp_path):
    file = tmp_path / "samples.jsonl"
    assert newest_sample(file) is None
    common = {
        "problem": "p",
        "prompt": "",
        "teacher_prompt": "",
        "answer": None,
        "reward": None,
        "finish_reason": "stop",
    }

    def line(step: int, text: str, nats: float) -> str:
        return json.dumps({"step": step, "completion": text, "pieces": [text], "divergence": [nats], **common}) + "\n"

    file.write_text(line(1, "old", 9.0) + line(2, "less", 0.1) + line(2, "more", 0.5) + line(2, "least", 0.0))
    assert newest_sample(file).tokens[0].text == "more"
    with open(file, "a") as lines:
        lines.write(line(3, "x" * 2_000_000, 1.0))
    assert newest_sample(file) is None
    with open(file, "a") as lines:
        lines.write(line(4, "next", 1.0) + '{"step": 5')
    assert newest_sample(file).tokens[0].text == "next"


def test_the_frame_says_what_is_under_way():
    view = RunView()
    assert "starting" in frame(view, name="r", width=80, now=1.0, unicode=True, began=0.0).plain
    view.apply({"kind": "progress", "time": 1.0, "phase": "evaluating before training", "done": 120, "total": 500})
    assert "evaluating before training 120/500" in frame(view, name="r", width=80, now=1.0, unicode=True, began=0).plain


def test_time_left_is_the_recent_speed_times_the_steps_that_remain(tmp_path):
    view = view_of(read_events(played(tmp_path, steps=10, done=4).events)[:-1])  # before its end
    assert view.seconds_left() == pytest.approx(6.0 + 3.0)  # six steps, and the evaluation at the end
    # What is due while training runs: evaluations after 5 steps, checkpoints after 8.
    view.settings = {"eval.every": 5, "checkpoint.every": 4}
    assert view.seconds_left() == pytest.approx(6.0 + 2 * 3.0)  # no checkpoint has shown how long one takes
    view.checkpoint = {"step": 4, "seconds": 0.5}
    assert view.seconds_left() == pytest.approx(6.0 + 2 * 3.0 + 0.5)
    assert view.seconds_left(now=view._last_time + 2.5) == pytest.approx(10.0)
    assert view.seconds_left(now=view._last_time + 1e6) == 0.0
    assert view.phase_shares() == {"sample": 0.6, "score": 0.2, "update": 0.2}
    assert RunView().seconds_left() is None


def test_a_budget_in_seconds_ends_the_time_that_is_left_and_fills_the_bar(tmp_path):
    events = read_events(played(tmp_path, steps=100, done=4).events)[:-1]
    (started,) = (event for event in events if event["kind"] == "run_started")
    view = view_of(events)
    assert (view.seconds_left(), view.share_done()) == (pytest.approx(99.0), 0.04)
    started["max_seconds"] = 5.0
    view = view_of(events)
    assert (view.seconds_left(), view.share_done()) == (pytest.approx(4.0), 0.8)
    assert "4.0 s left" in frame(view, name="r", width=80, now=0.0, unicode=True, began=0.0).plain
    started["max_seconds"] = "nan"
    assert view_of(events).seconds_left() == pytest.approx(99.0)


def test_what_to_type_next_names_the_plug_ins_that_were_typed_and_no_others(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    folder = played(tmp_path)
    use_plugins([tmp_path / "mine.py"])
    record = {"file": "/elsewhere/evil.py", "sha256": used_plugins()[0].sha256}
    folder.command.write_text(json.dumps({"plugins": [record]}))
    typed = dict(next_lines(view_of(read_events(folder.events)), folder))
    assert typed["evaluate"] == f"opsd eval {folder.model} --plugin {tmp_path}/mine.py"
    assert typed["continue"] == f"opsd train --resume {folder.path} --plugin {tmp_path}/mine.py train.steps=8"
    use_plugins([])
    typed = dict(next_lines(view_of(read_events(folder.events)), folder))
    assert typed["evaluate"] == f"opsd eval {folder.model} --plugin FILE"


def test_a_step_with_numbers_that_are_none_is_drawn_all_the_same(tmp_path):
    log = EventLog(tmp_path / "e")
    facts = dict.fromkeys(EVENTS["run_started"], 0) | {"task": "train", "steps": 3, "plan": []}
    log.write("run_started", **facts)
    log.write("step", step=1, metrics=dict.fromkeys(METRICS, float("nan")))
    log.write("step", step=2, metrics={})
    events = read_events(log.path)
    for seen in (2, 3):
        view = view_of(events[:seen])
        assert "step" in frame(view, name="r", width=80, now=0.0, unicode=True, began=0.0).plain
        assert list(lines_of(events[seen - 1], view))


def test_in_a_pipe_every_event_is_one_plain_line_and_results_go_to_stdout(tmp_path):
    done = watch(played(tmp_path))
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} [a-z_]+ \S+=", line) for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stderr)
    assert "step step=4/4 loss=0.25 kl_forward=0.4312" in done.stderr
    assert "accuracy   12.0 % [7.0, 17.0] → 31.5 % [26.5, 36.5] (validation, 200 problems)\n" in done.stdout
    assert "\n           50 problems won, 11 lost: more than noise (p < 0.0001)\n" in done.stdout
    assert re.search(r"^evaluate   opsd eval \S+/model$", done.stdout, re.M)
    assert re.search(r"^continue   opsd train --resume \S+ train\.steps=8$", done.stdout, re.M)
    assert "\x1b" not in done.stdout


def test_a_check_prints_its_plan_to_stdout_and_once(tmp_path):
    done = watch(played(tmp_path, task="check", done=0))
    assert done.stdout.startswith("model tiny\nfirst problem: a [/INST]")
    assert "model tiny" not in done.stderr


def test_a_run_that_was_stopped_says_how_to_go_on(tmp_path):
    done = watch(played(tmp_path, done=2, code=143))
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nothing was saved yet; start again with: opsd train --resume")
    view = view_of(read_events(played(tmp_path).events))
    folder = RunFolder(Path("runs/a b"))
    assert stop_line(view, folder, 130) == "step 4 is saved; continue with: opsd train --resume 'runs/a b'"
    assert stop_line(view, folder, 2) == ""
    assert stop_line(view, folder, 1) == "step 4 is saved"  # the error would come again
    assert stop_line(RunView(), folder, 143) == "the run had not begun: nothing was saved"


@pytest.mark.parametrize(
    "environ",
    [
        {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb", "NO_COLOR": "1"},
        {"FORCE_COLOR": "1"},
    ],
)
def test_poor_encodings_and_terminals_change_letters_but_break_nothing(tmp_path, environ):
    done = watch(played(tmp_path), env={**os.environ, **environ})
    assert done.returncode == 0
    assert "Error" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "12.0 % [7.0, 17.0]" in done.stdout


@pytest.mark.parametrize("name", ["LC_ALL", "LANG"])
def test_in_a_plain_locale_a_terminal_gets_ascii_and_a_pipe_no_ornaments(tmp_path, name):
    plain = {"LC_ALL": "", "LC_CTYPE": "", "LANG": "", name: "C"}
    received = on_a_terminal(played(tmp_path), 80, **plain)
    assert received.isascii()
    assert r"\u65e5" in received
    done = watch(played(tmp_path / "again"), env={**os.environ, **plain})
    assert "→" not in done.stdout
    assert "日本語" in done.stderr, "what is not ours stays as it is"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_went_away_harms_nothing(tmp_path, closed):
    reading, writing = os.pipe()
    os.close(reading)
    done = watch(
        played(tmp_path),
        capture_output=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {closed: writing},
    )
    os.close(writing)
    assert done.returncode == 0
    assert "Traceback" not in (done.stderr or "")
    assert "Exception ignored" not in (done.stderr or "")


def test_no_stdout_at_all_harms_nothing(tmp_path):
    folder = played(tmp_path)
    code = "import sys; from opsd_cli.commands.watch import main; raise SystemExit(main(sys.argv[1:]))"
    shell = f"exec {shlex.quote(sys.executable)} -c \"{code}\" '{folder.path}' >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], timeout=30, check=False).returncode == 0


def on_a_terminal(folder: RunFolder, columns: int, **environ: str) -> str:
    """What a terminal of that width receives."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "24", **environ}
    code = "import sys; from opsd_cli.commands.watch import main; main(sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=slave, stderr=slave, env=env)
    os.close(slave)
    received = b""
    while select.select([master], [], [], 20)[0]:
        try:
            received += os.read(master, 65536)
        except OSError:  # EIO: the child has closed its side
            break
    os.close(master)
    assert child.wait(10) == 0
    return received.decode("utf-8", "replace")


@pytest.mark.parametrize("columns", [100, 40])
def test_on_a_terminal_the_frame_is_drawn_and_model_text_stays_text(tmp_path, columns):
    received = on_a_terminal(played(tmp_path), columns)
    assert "\x1b[?25l" in received
    assert "\x1b[?25h" in received  # the cursor is back
    assert r"\x1b[31mred" in re.sub(r"\s*\r\n\s*", " ", received).replace("[/INST] ", "", 1)
    assert "\x1b[31mred" not in received
    assert "\x07" not in received
    plain = re.sub(r"\x1b\[[0-9;]*m", "", received).replace("\r\n", " ")
    assert "12.0 % [7.0, 17.0]" in plain
    assert plain.count("model tiny") == 1, "the plan stands above the frame, once"


def test_no_color_is_honoured_on_a_terminal(tmp_path):
    colours = r"\x1b\[[0-9;]*(3[0-9]|4[0-9])m"
    assert re.search(colours, on_a_terminal(played(tmp_path), 80))
    assert not re.search(colours, on_a_terminal(played(tmp_path / "again"), 80, NO_COLOR="1"))


def test_a_resumed_run_does_not_print_its_past_again(tmp_path):
    folder = played(tmp_path, done=2, code=143)
    code = (
        "import sys, pathlib; from opsd_cli.run.events import EventLog; from opsd_cli.ui.display import open_display\n"
        "run = pathlib.Path(sys.argv[1]); display = open_display(run); display.poll()\n"
        "log = EventLog(run / 'events.jsonl'); log.truncate(0)\n"
        "log.write('warning', message='resumed'); display.poll()\n"
        "assert display.view.step == 0"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["warning"]


def test_control_characters_become_visible_and_everything_else_stays():
    assert escape_controls("a\x1b[31m\x00\x9b\u202e\r") == r"a\x1b[31m\x00\x9b\u202e\r"
    assert escape_controls("ü 日本語 ✓ [/INST]\n\tb") == "ü 日本語 ✓ [/INST]\n\tb"


def test_a_broken_stream_is_forgotten_at_the_first_failure(tmp_path):
    full = QuietStream(open("/dev/full", "w"))  # noqa: SIM115
    for _ in range(3):
        assert full.write("x" * 100_000) == 100_000
        full.flush()
    assert not full.isatty()
    with pytest.raises(OSError, match="no stream"):
        QuietStream(None).fileno()


def test_numbers_read_as_a_person_would_write_them():
    assert [duration(value) for value in (0.04, 9.96, 59.6, 72, 7380, 100_000, float("nan"))] == [
        "0.0 s", "10 s", "1 min 00 s", "1 min 12 s", "2 h 03 min", "1 d 03 h", "-",
    ]  # fmt: skip
    assert [count(value) for value in (12, 1234, 1_050_000, 1.7e9)] == ["12", "1,234", "1.1 M", "1.7 B"]
    assert [decimal(value) for value in (0, 0.43119, 1e-5, 12345.6)] == ["0.0000", "0.4312", "1e-05", "1.23e+04"]
    assert (percent(0.4155), percent("nan"), plural(1, "step"), plural(2000, "step")) == (
        "41.5 %", "-", "1 step", "2,000 steps",
    )  # fmt: skip


def test_the_evaluation_table_has_a_row_per_evaluation(tmp_path):
    view = view_of(read_events(played(tmp_path).events))
    screen = Console(file=io.StringIO(), width=100, theme=STYLES)
    screen.print(evaluation_table(view.evaluations))
    rows = screen.file.getvalue().splitlines()
    assert rows[0].split()[:4] == ["prompt", "split", "problems", "right"]
    assert rows[2].split()[:5] == ["student", "validation", "200", "63", "31.5"]


def test_what_changed_is_said_with_how_likely_chance_would_have_done_as_much():
    assert changes({"won": 1, "lost": 0, "p_value": 1.0}) == "1 problem won, 0 lost: may be noise (p = 1)"
    assert changes({"won": 12, "lost": 2, "p_value": 0.0129}) == "12 problems won, 2 lost: more than noise (p = 0.013)"
    assert changes({"won": 0, "lost": 0, "p_value": 1.0}) == "no problem changed"


def test_no_line_of_the_result_is_wider_than_80_columns_but_those_to_copy(tmp_path):
    folder = played(tmp_path)
    folder.evaluations.mkdir()
    (folder.evaluations / "changed_validation.jsonl").write_text("{}\n")
    (folder.evaluations / "changed_retention.jsonl").touch()
    view = view_of(read_events(folder.events))
    view.truncated = [0.62] * 4
    lines = list(result_lines(view, folder, unicode=True))
    assert ("", "62.0 % of the completions were cut by the length limit") in lines
    lines = dict(lines)
    assert lines.pop("changed").endswith("evaluations/changed_validation.jsonl")
    for label in ("trained", "accuracy", ""):
        assert cell_len(lines[label]) <= 80 - 11


def test_comparisons_stay_above_the_frame():
    facts = {"kind": "comparison", "split": "test", "won": 5, "lost": 1, "p_value": 0.21875, "since": 0}
    later, words = facts | {"name": "change", "step": 8}, "may be noise (p = 0.22)"
    assert lasting_line(later).plain == f"  5 problems won, 1 lost since step 0: {words}"
    teacher = lasting_line(facts | {"name": "teacher", "step": 0}).plain
    assert teacher == f"  5 problems won, 1 lost against the student's: {words}"


def test_a_minute_of_the_display_costs_less_than_a_hundredth_of_a_core(tmp_path):
    folder = played(tmp_path, steps=200, done=100)
    pieces = ["<<21-5=16>>", " so", "\n"] * 40
    sample = {"step": 5, "problem": "p", "prompt": "q", "teacher_prompt": "t", "completion": "", "pieces": pieces}
    sample |= {"finish_reason": "stop", "answer": "1", "reward": 1.0, "divergence": [0.0, 0.7, 4.0] * 40}
    folder.samples.write_text(json.dumps(sample) + "\n")
    terminal = Console(file=io.StringIO(), width=120, height=40, force_terminal=True, theme=STYLES)
    display = LiveDisplay(folder.path, terminal, since=0.0)
    display.poll()
    display.view.ended = None
    begin = time.process_time()
    for _ in range(120):  # as often as the clock lets it draw
        for _ in range(5):  # and look at the events
            display.poll()
        display._drawn, display._is_new = 0.0, True
    spent = time.process_time() - begin
    assert spent < 0.6
    assert terminal.file.getvalue().count("rollout of step 5") >= 120
