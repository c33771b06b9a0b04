"""`opsd report`: what it says of one run, of several and of a sweep; its page is safe, readable and complete."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recipe_support import opsd
from run_support import make_run, make_sweep

from opsd_cli.api import load_run
from opsd_cli.insight.charts import moving_mean
from opsd_cli.insight.samples import token_class
from opsd_cli.rank.recorder import token_pieces
from opsd_cli.run.events import METRICS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "</script><img src=http://127.0.0.1:9/x onerror=alert(1)> [/INST] \x1b[31m \u202egnp.exe $x$ {{ 7*7 }} "
    "\U0001f937\U0001f3fd \u0645\u0631 & 'q' \"w\""
)

pytestmark = pytest.mark.usefixtures("tmp_cwd")


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_report_of_a_run_says_what_came_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "a")
    code, out, _ = opsd(capsys, "report", "a")
    assert code == 0
    for words in (
        "a: train, completed, 20 of 20 steps",
        "25.0 % [14.2, 40.2] -> 75.0 % [59.8, 85.8]",
        "20 problems won, 0 lost: more than noise",
        "loss/objective",
        "divergence by class of token, first and last samples: style 0.4000 -> 0.4000, number 1.0000 -> 1.0000",
        "1,200 completion tokens in 6.0 s (sample 33 %, score 17 %, update 33 %), 0.5 GiB at most",
        "warning: possible drift: 7+3=10.",
        "opsd train recipe=quickstart",
    ):
        assert words in out, words


def test_a_sweep_is_ranked_and_failed_members_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    make_sweep(
        Path("runs/sweep"),
        {
            "low": {"right": (10, 12), "changes": {"optim.lr": 0.001}},
            "high": {"right": (10, 30), "changes": {"optim.lr": 0.1}},
            "nan": {"outcome": "failed", "message": "loss is nan", "changes": {"optim.lr": 9.0}},
            "gone": None,
        },
    )
    code, out, _ = opsd(capsys, "report", "runs/sweep")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:4]] == ["high", "low", "nan"]
    assert lines[0].split()[:3] == ["run", "lr", "state"]
    assert "failed" in lines[3]
    assert "high against low: 18 problems won, 0 lost" in out
    assert "gone: optim.lr=gone: left no run (exit code 4)" in out
    _, out, _ = opsd(capsys, "report", "runs/sweep", "--md")
    assert out.splitlines()[0].startswith("| run | lr | state |")
    assert out.splitlines()[1].startswith("| --- |")
    _, out, _ = opsd(capsys, "report", "runs/sweep", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["run"], row["optim.lr"], row["after"]) for row in rows] == [
        ("high", "0.1", "0.75"), ("low", "0.001", "0.3"), ("nan", "9.0", ""),
    ]  # fmt: skip


def test_programs_get_steps_and_everything(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "a")
    _, out, _ = opsd(capsys, "report", "a", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert float(rows[3]["loss/objective"]) == 0.25
    _, out, _ = opsd(capsys, "report", "a", "--json")
    whole = json.loads(out)["runs"][0]
    assert whole["summary"]["after"]["accuracy"] == 0.75
    assert whole["settings"]["optim.lr"] == 0.001


def test_a_notebook_gets_tables_of_steps_evaluations_samples_and_tokens() -> None:
    run = load_run(make_run(Path("runs"), "a").path)
    assert list(run.frame("steps")["loss/objective"]) == [1 / step for step in range(1, 21)]
    assert list(run.frame("evaluations")["accuracy"]) == [0.25, 0.75]
    assert list(run.frame("samples")["step"]) == [1, 20]
    tokens = run.frame("tokens")
    assert tokens.groupby("class")["divergence"].mean().to_dict() == {"number": 1.0, "other": 9.0, "style": 0.4}


def test_a_metric_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert opsd(capsys, "report", "--explain", "kl/forward")[1] == f"kl/forward: {METRICS['kl/forward']}\n"
    code, _, err = opsd(capsys, "report", "--explain", "kl/foward")
    assert code == 2
    assert "did you mean 'kl/forward'?" in err


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, _Page]:
    code, _, _ = opsd(capsys, "report", *words, "--html", "out/page.html")
    assert code == 0
    text = Path("out/page.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    return text, page


def test_text_from_models_and_data_is_shown_literally(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "a", text=HOSTILE)
    text, page = page_of(capsys, "a")
    assert {"script", "img", "iframe", "link", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "\x1b" not in text
    assert "\u202e" not in text
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert page.text.count(shown) >= 4  # completion, both prompts, the warning
    assert "default-src 'none'" in text
    assert not any((value or "").startswith(("http", "//")) for _, found in page.tags for value in found.values())


def test_the_page_of_a_run_has_curves_samples_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs"), "a")
    text, page = page_of(capsys, "a")
    pictures = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) >= 10
    assert all(pictures)
    tokens = [a["title"] for tag, a in page.tags if tag == "span" and a.get("class") == "token"]
    assert tokens == ["0.4000 nats", "2.0000 nats", "9.0000 nats"] * 2
    assert "optim.lr" in page.text
    assert "opsd train recipe=quickstart" in page.text
    ids = re.findall(r' id="([^"]+)"', text)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)  # clips of curves


def test_members_of_the_same_name_in_two_sweeps_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    make_sweep(Path("runs/a"), {"0": {"right": (10, 30)}, "1": {"outcome": "failed"}})
    make_sweep(Path("runs/b"), {"0": {"right": (10, 20)}, "1": {}, "2": None})
    code, out, _ = opsd(capsys, "report", "a", "b", "--json")
    assert code == 0
    found = json.loads(out)
    assert sorted(run["run"] for run in found["runs"]) == ["a/0", "a/1", "b/0", "b/1"]
    assert [one["run"] for one in found["missing"]] == ["b/2"]
    _, out, _ = opsd(capsys, "report", "a", "b", "--csv")
    rows = {row["run"]: row["exit_code"] for row in csv.DictReader(out.splitlines())}
    assert rows == {"a/0": "0", "a/1": "4", "b/0": "0", "b/1": "0"}


def test_of_a_member_that_was_run_again_the_last_end_counts(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(Path("runs/a"), {"0": {}, "1": {}})
    lines = (sweep / "members.jsonl").read_text().splitlines()
    failed = json.dumps({**json.loads(lines[0]), "code": 3})
    (sweep / "members.jsonl").write_text("\n".join([failed, *lines]) + "\n")
    assert "3" not in {row["exit_code"] for row in csv.DictReader(opsd(capsys, "report", "a", "--csv")[1].splitlines())}


def test_a_sweeps_page_shows_results_against_what_was_swept(capsys: pytest.CaptureFixture[str]) -> None:
    members = {
        f"{i}": {"right": (10, 12 + i), "changes": {"optim.lr": 0.1**i, "divergence.name": f"$d{i % 2}"}}
        for i in range(4)
    }
    make_sweep(Path("runs/sweep"), {**members, "gone": None})
    _, page = page_of(capsys, "runs/sweep")
    assert "Accuracy against optim.lr" in page.text
    assert "Accuracy against divergence.name" in page.text
    assert "optim.lr=gone: left no run" in page.text
    assert "problem by problem" in page.text


def test_a_setting_that_one_option_has_is_not_drawn_against_its_absence(capsys: pytest.CaptureFixture[str]) -> None:
    only = {"divergence.name": "jsd", "divergence.beta": 0.5}
    make_sweep(Path("runs/sweep"), {"0": {"right": (10, 20), "changes": only}, "1": {"right": (10, 30)}})
    _, page = page_of(capsys, "runs/sweep")
    assert "Accuracy against divergence.name" in page.text
    assert "Accuracy against divergence.beta" not in page.text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
def test_a_browser_opens_the_page_without_a_complaint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_run(Path("runs"), "a", text=HOSTILE)
    page_of(capsys, "a")
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'c'}",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *words, "--window-size=360,900", "--dump-dom", (tmp_path / "out/page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert "Sample rollouts" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr


def test_text_stands_out_from_its_ground_in_light_and_dark() -> None:
    css = (Path(__file__).parents[1] / "opsd_cli/assets/pages/page.css").read_text(encoding="utf-8")
    for palette in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", palette))
        for ground in ("page", "card"):
            for ink in ("ink", "soft", "link", "good", "bad"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)  # WCAG 2.2 AA, text
            for line in range(8):
                assert contrast(colours[f"c{line}"], colours[ground]) >= 3, (line, ground)  # ... graphics


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_the_pieces_of_a_completion_are_its_text() -> None:
    data = "Hé 🤷🏽‍♀️ 数, done".encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    pieces = token_pieces(list(data), decode)  # a byte for each token: characters of up to four
    assert "".join(pieces) == data.decode()
    assert len(pieces) == len(data)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert token_pieces(list(b"ab\xf0\x9f"), decode)[:2] == ["a", "b"]  # cut within a character


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (" 12", "number"), ("=", "number"), ("\\frac", "number"), ("-", "number"), (" Wait", "style"),
        (" so,", "style"), (" apple", "other"), ("<|end|>", "other"), ("</s>", "other"), ("so-and", "other"),
    ],
)  # fmt: skip
def test_tokens_are_told_apart_by_class(piece: str, kind: str) -> None:
    assert token_class(piece) == kind


def test_a_moving_mean_keeps_a_constant_and_the_number_of_values() -> None:
    assert moving_mean([2.0] * 50) == pytest.approx([2.0] * 50)
    assert moving_mean([0.0, 3.0, 0.0], share=0.1) == pytest.approx([1.5, 1.0, 1.5])
