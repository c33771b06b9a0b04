"""The events file: one writer, readers that never see half a line, and a resume without
duplicates or gaps.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from opsd_cli.run.events import METRICS, EventFollower, EventLog, JsonLines, number, read_events
from opsd_cli.run.summary import summarise
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.settings.errors import OutsideError
from opsd_cli.testing import fault_points


def kinds(path: Path) -> list[str]:
    return [event["kind"] for event in read_events(path)]


def test_what_is_written_is_read_back_in_order(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("warning", message="naïve ✓ [/INST] \x1b[31m \u2028 \udc80")
    log.write("step", step=1, metrics={"loss/objective": 0.5})
    first, second = read_events(log.path)
    assert first["message"].startswith("naïve ✓ [/INST] \x1b[31m \u2028")
    assert second["metrics"] == {"loss/objective": 0.5}
    assert first["time"] <= second["time"]


def test_a_file_may_be_shown_on_a_terminal_and_each_line_stays_one(tmp_path):
    text = "ü 日本語 ✓ \x1b[31m \x7f \x9b2J \u2028 \u202e \udc80 \n"
    lines = JsonLines(tmp_path / "samples.jsonl")
    lines.append({"completion": text})
    written = lines.path.read_text()
    assert "ü 日本語 ✓" in written
    assert escape_controls(written) == written
    assert len(written.splitlines()) == 1
    assert json.loads(written)["completion"] == text


def test_numbers_that_json_has_not_are_written_as_words_and_read_back(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    odd = {"loss/objective": math.nan, "kl/forward": math.inf, "kl/reverse": -math.inf}
    log.write("step", step=1, metrics=odd)
    line = log.path.read_text()
    assert json.loads(line, parse_constant=lambda word: pytest.fail(word))
    metrics = read_events(log.path)[0]["metrics"]
    assert math.isnan(number(metrics["loss/objective"]))
    assert number(metrics["kl/forward"]) == math.inf
    assert number(metrics["kl/reverse"]) == -math.inf
    assert math.isnan(number(None))
    assert math.isnan(number("12"))


def test_kinds_fields_and_metric_names_are_closed(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(AssertionError, match="unknown event kind"):
        log.write("stepp", step=1)
    with pytest.raises(AssertionError, match="fields"):
        log.write("warning", text="x")
    with pytest.raises(AssertionError, match="loss/objectiv'"):
        log.write("step", step=1, metrics={"loss/objectiv": 1.0})
    assert read_events(log.path) == []


def test_every_metric_has_one_sentence():
    for name, sentence in METRICS.items():
        assert name.count("/") == 1
        assert sentence[0].isupper()
        assert sentence.endswith(".")


def test_truncating_to_an_offset_drops_exactly_the_later_events(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("warning", message="one")
    kept = log.offset()
    log.write("warning", message="two")
    log.close()
    again = EventLog(log.path)
    again.truncate(kept)
    again.write("warning", message="three")
    assert [event["message"] for event in read_events(log.path)] == ["one", "three"]
    with pytest.raises(ValueError, match="bytes"):
        again.truncate(again.offset() + 1)


@pytest.mark.parametrize("torn", ['{"kind": "step", "st', '{"kind": "warning", "message": "' + "x" * 200_000])
def test_a_line_torn_by_a_crash_is_ignored_and_then_overwritten(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    EventLog(path).write("warning", message="whole")
    with open(path, "a") as file:
        file.write(torn)
    assert kinds(path) == ["warning"]
    EventLog(path).write("warning", message="next")
    assert [event["message"] for event in read_events(path)] == ["whole", "next"]


def test_lines_that_are_no_events_are_skipped(tmp_path):
    path = tmp_path / "events.jsonl"
    wrong = (
        b'\x00\x00\x00\n[1]\n{"a": 1}\n{"kind": "step", "time": 0}\n{"kind": "warning", "message": "no time"}\n\xff\n'
    )
    path.write_bytes(wrong + b'{"kind": "warning", "message": "m", "time": 0}\n')
    assert kinds(path) == ["warning"]
    assert read_events(tmp_path / "absent.jsonl") == []


def test_events_with_fields_that_nobody_could_use_are_skipped(tmp_path):
    path = tmp_path / "events.jsonl"
    step = {"kind": "step", "time": 1.0, "step": 1, "metrics": {"loss/objective": 10**400}}
    odd = [{**step, "metrics": None}, {**step, "step": "1"}, {**step, "time": None}]
    lines = [*map(json.dumps, odd), "[" * 100_000, json.dumps(step)]
    path.write_text("\n".join(lines) + "\n")
    (event,) = read_events(path)
    assert number(event["metrics"]["loss/objective"]) == math.inf
    summary = summarise([event], command={})
    assert (summary["completion_tokens"], summary["training_seconds"]) == (0, 0)


def test_a_follower_waits_for_the_rest_of_a_line_and_notices_a_rewind(tmp_path):
    path = tmp_path / "events.jsonl"
    follower = EventFollower(path)
    assert follower.poll() == []
    log = EventLog(path)
    log.write("warning", message="a")
    with open(path, "a") as file:
        file.write('{"time": 1, "kind": "warn')
        file.flush()
        assert len(follower.poll()) == 1
        file.write('ing", "message": "b"}\n')
    assert [event["message"] for event in follower.poll()] == ["b"]
    log.truncate(0)
    log.write("warning", message="c")
    assert [event["message"] for event in follower.poll()] == ["c"]
    assert follower.rewound


def test_a_rewind_is_noticed_although_the_file_has_grown_beyond_what_was_read(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    follower = EventFollower(log.path)
    log.write("warning", message="short")
    assert len(follower.poll()) == 1
    assert not follower.rewound
    log.truncate(0)
    log.write("warning", message="a longer one")
    log.write("warning", message="another")
    assert [event["message"] for event in follower.poll()] == ["a longer one", "another"]
    assert follower.rewound
    assert follower.poll() == []
    assert not follower.rewound


def test_a_follower_reads_what_a_running_writer_adds_once_and_in_order(tmp_path):
    path = tmp_path / "events.jsonl"
    done = threading.Event()

    def write() -> None:
        log = EventLog(path)
        for number_ in range(50):
            log.write("warning", message=str(number_))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    follower, seen = EventFollower(path), []
    while not done.is_set():
        seen += [event["message"] for event in follower.poll()]
    writer.join()
    seen += [event["message"] for event in follower.poll()]
    assert seen == [str(number_) for number_ in range(50)]


def test_a_warning_may_have_a_name_and_one_of_an_earlier_version_has_none(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("warning", message="old")
    log.write("warning", name="entropy", message="new")
    log.append({"kind": "warning", "time": 1.0, "name": 5, "message": "broken"})
    assert [(event.get("name"), event["message"]) for event in read_events(log.path)] == [
        (None, "old"),
        ("entropy", "new"),
    ]


def test_progress_is_written_at_its_edges_and_now_and_then(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.progress("loading")
    for done in range(1, 1001):
        log.progress("evaluating", done=done, total=1000)
    said = [(event["phase"], event["done"]) for event in read_events(log.path)]
    assert said[0] == ("loading", 0)
    assert said[1] == ("evaluating", 1)
    assert said[-1] == ("evaluating", 1000)
    assert len(said) < 20


def test_a_full_disk_is_an_outside_error_and_the_half_line_is_dropped_by_the_next_writer(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = JsonLines(path)
    lines.append({"step": 1})
    fault_points.arm({"OPSD_FAULT": "enospc@lines.half:1"})
    try:
        with pytest.raises(
            OutsideError, match=r"cannot write .*samples\.jsonl: No space left on device; free disk space"
        ):
            lines.append({"step": 2})
    finally:
        fault_points.arm({})
    lines.close()
    assert not path.read_text().endswith("\n")
    again = JsonLines(path)
    again.append({"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 3}]
