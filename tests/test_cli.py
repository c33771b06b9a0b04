"""The commands as a person types them: help, listings, one-line errors and exit codes. No ranks are started here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipe_support import opsd, write_recipe

from opsd_cli import __version__
from opsd_cli.cli import COMMANDS
from opsd_cli.commands.evaluate import find_target
from opsd_cli.commands.members import Result
from opsd_cli.commands.sweep import table_lines, worst_code
from opsd_cli.commands.train import name_hint
from opsd_cli.insight.earlier_members import safe_name
from opsd_cli.run.events import EventLog
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import builtin_folder, find_folders


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


ROOT = Path(__file__).parents[1]
PROGRAM = {**os.environ, "PYTHONPATH": str(ROOT)}


def run_program(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "opsd_cli", *words], capture_output=True, text=True, env={**PROGRAM, **environ}
    )


def test_help_names_every_command_and_begins_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(capsys, "--help")
    assert (code, err) == (0, "")
    assert out.index("opsd train recipe=quickstart") < out.index("commands:")
    assert all(f"  {name}" in out for name in COMMANDS)
    assert opsd(capsys)[1] == out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"opsd {name}")
    assert opsd(capsys, "help", name)[1] == out
    assert max(map(len, out.splitlines())) <= 120


def test_the_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert opsd(capsys, "--version") == (0, f"opsd {__version__}\n", "")


def test_an_unknown_command_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(capsys, "trian", "recipe=gsm8k")
    assert (code, out) == (2, "")
    assert err.startswith("opsd: unknown command 'trian' - did you mean 'train'?")
    assert "did you mean 'opsd train recipe=gsm8k'?" in opsd(capsys, "recipe=gsm8k")[2]


def test_an_unknown_flag_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = opsd(capsys, "train", "recipe=quickstart", "--dryrun")
    assert code == 2
    assert "unknown flag --dryrun - did you mean '--dry-run'?" in err
    assert "--recipes DIR" in opsd(capsys, "train", "--config-path", "x")[2]


def test_every_problem_is_one_line_on_stderr_and_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(capsys, "train", "recipe=quickstart", "optm.lr=1", "train.steps=x")
    assert (code, out) == (2, "")
    assert [line.split(":")[0] for line in err.splitlines()] == ["opsd", "opsd"]
    assert not list(Path().iterdir())


@pytest.mark.parametrize("typed", ["~nosuchuser/x", "a" * 300, f"below/{'é' * 130}/x"], ids=["user", "long", "bytes"])
@pytest.mark.parametrize(
    "words",
    [
        "train recipe=quickstart run.root={}", "train -m recipe=quickstart run.root={} optim.lr=1e-4,2e-4",
        "train recipe=jsonl dataset.path={}", "train recipe=quickstart model.path={} model=hf",
        "train recipe=quickstart model.chat_template={}", "train recipe=quickstart --recipes {}", "eval {}", "watch {}",
        "train recipe=quickstart launcher=deepspeed launcher.hostfile={}", "train --resume {}", "train recipe={}",
    ],
)  # fmt: skip
def test_a_path_that_cannot_be_is_a_mistake_and_no_bug(
    words: str, typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = opsd(capsys, *words.format(typed).split())
    assert (code, out) == (2, "")
    assert typed[:20] in err.splitlines()[0]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSD_DEBUG", "1")
    with pytest.raises(ConfigError, match=r"optm\.lr"):
        opsd(capsys, "train", "recipe=quickstart", "optm.lr=1")


def test_a_bug_is_one_line_that_names_where_its_traceback_is(tmp_path: Path) -> None:
    script = (
        "import sys, tempfile; from opsd_cli import cli; tempfile.tempdir = sys.argv.pop()\n"
        "from opsd_cli.commands import train; train.main = lambda: 0  # takes no words\n"
        "sys.exit(cli.main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, "train", str(tmp_path)], capture_output=True, text=True, env=PROGRAM
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("opsd: this is a bug in opsd (TypeError")
    assert "Traceback" in Path(line.rpartition(" ")[2]).read_text()


def test_a_closed_pipe_ends_the_output_without_a_word() -> None:
    python = shlex.quote(sys.executable)
    script = f"{python} -m opsd_cli recipes | head -1; {python} -m opsd_cli --help | true"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, env=PROGRAM)
    assert ended.stderr == ""
    assert ended.returncode == 0


def test_output_that_the_terminal_cannot_show_is_escaped() -> None:
    write_recipe(Path("recipes"), "recipe/mine", "# @package _global_\n# Für Ω\n")
    ended = run_program("recipes", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert ended.returncode == 0
    assert "F\\xfcr \\u03a9" in ended.stdout


def test_recipes_lists_every_option_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(Path("recipes"), "recipe/mine", "# @package _global_\n# My own\n")
    code, out, err = opsd(capsys, "recipes")
    assert (code, err) == (0, "")
    for group, options in find_folders().files.items():
        assert f"{group}=  " in out
        assert all(f"  {option}" in out for option in options)
    assert "My own  (recipes/recipe/mine.yaml)" in out


def test_show_prints_the_composed_config_as_valid_yaml_with_comments(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = opsd(capsys, "recipes", "show", "gsm8k")
    assert code == 0
    tree = yaml.safe_load(out)
    assert tree["optim"]["lr"] == 5e-6
    assert tree["context"]["teacher"].startswith("{{question}}\n\nReference solution:")
    assert "temperature: 1.1 # of the softmax that is sampled from" in out


def test_show_prints_a_group_or_the_file_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    jsd = (builtin_folder() / "divergence/jsd.yaml").read_text()
    assert opsd(capsys, "recipes", "show", "divergence/jsd")[1] == jsd
    assert opsd(capsys, "recipes", "show", "jsd")[1] == jsd
    skip3 = opsd(capsys, "recipes", "show", "skip3")[1]
    assert (
        "skip_first: 3 # tokens at the start of a completion that carry no loss\nfirst: 0 # tokens of a completion"
        in skip3
    )
    assert "reverse_kl" in opsd(capsys, "recipes", "show", "divergence")[1]
    assert "did you mean 'gsm8k'?" in opsd(capsys, "recipes", "show", "gsm8")[2]
    assert "in several groups" in opsd(capsys, "recipes", "show", "none")[2]


def test_what_a_stranger_wrote_is_shown_and_never_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(Path("recipes"), "divergence/evil", "# red \x1b[31m \u202e here\nname: jsd\n")
    path.write_bytes(path.read_bytes() + b"# \xff\n")
    for words in (("recipes",), ("recipes", "show", "divergence"), ("recipes", "show", "divergence/evil")):
        code, out, _ = opsd(capsys, *words)
        assert code == 0
        assert "red \\x1b[31m \\u202e here" in out
        assert "\x1b" not in out
    code, _, err = opsd(capsys, "recipes", "show", "a\x1b[31m\nb")
    assert (code, err) == (2, "opsd: unknown recipe or option 'a\\x1b[31m\\nb' (see `opsd recipes`)\n")


def test_a_flood_of_problems_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(Path("recipes"), "recipe/flood", "# x\n" + "_target_: x\n" * 2000)
    code, _, err = opsd(capsys, "train", "recipe=quickstart")
    assert code == 2
    assert len(err.splitlines()) == 41
    assert err.splitlines()[-1] == "opsd: ... and 3,959 more problems"


def test_a_section_that_is_not_there_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert opsd(capsys, "train", "--cfg", "job", "recipe=quickstart", "--package", "nothing")[0] == 2
    assert "not the name of a section" in opsd(capsys, "train", "--cfg", "job", "recipe=quickstart", "-p", "a b")[2]


def test_copy_writes_a_recipe_to_edit_and_never_overwrites(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = opsd(capsys, "recipes", "copy", "gsm8k")
    copied = Path("recipes/recipe/gsm8k.yaml")
    assert code == 0
    assert "opsd train recipe=gsm8k" in out
    first, schema, *rest = copied.read_text().splitlines(keepends=True)
    assert first + "".join(rest) == (builtin_folder() / "recipe/gsm8k.yaml").read_text()
    assert schema == "# yaml-language-server: $schema=../.schema/recipe.json\n"  # for editors
    copied.write_text("mine")
    code, _, err = opsd(capsys, "recipes", "copy", "gsm8k")
    assert code == 2
    assert "never overwritten" in err
    assert copied.read_text() == "mine"
    assert opsd(capsys, "recipes", "copy", "divergence/jsd", "elsewhere")[0] == 0
    assert Path("elsewhere/divergence/jsd.yaml").is_file()
    assert opsd(capsys, "recipes", "copy", "tokens/skip3")[0] == 0
    assert Path("recipes/tokens/skip3.yaml").read_text() == opsd(capsys, "recipes", "show", "tokens/skip3")[1]


def test_copy_says_when_it_cannot_write(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").write_text("a file in the way")
    code, _, err = opsd(capsys, "recipes", "copy", "gsm8k")
    assert code == 3
    assert "cannot write recipes/recipe/gsm8k.yaml" in err


@pytest.mark.slow
def test_cfg_prints_the_composed_config_as_hydra_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(capsys, "train", "--cfg", "job", "recipe=quickstart", "train.steps=7")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["train"]["steps"] == 7
    code, out, _ = opsd(capsys, "train", "recipe=quickstart", "--cfg", "job", "--package", "train")
    assert yaml.safe_load(out)["steps"] == 80
    assert "path: ???" in opsd(capsys, "train", "recipe=jsonl", "--cfg=job")[1]
    assert opsd(capsys, "train", "recipe=quickstart", "--cfg", "job", "optm.lr=1")[0] == 2


@pytest.mark.slow
def test_hydras_info_and_help_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "recipe: quickstart" in opsd(capsys, "train", "recipe=quickstart", "--info", "defaults-tree")[1]
    assert "== Flags ==" in opsd(capsys, "train", "--hydra-help")[1]


def test_what_needs_a_package_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = opsd(capsys, "train", "-m", "recipe=quickstart", "hydra/sweeper=optuna")
    assert code == 2
    assert "pip install 'opsd-cli[optuna]'" in err


def test_resume_keeps_the_frozen_config(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-m"], ["--dry-run"], ["--recipes", "x"], ["divergence=jsd"], ["train.steps=1,2"], ["lr = 3"]):
        assert opsd(capsys, "train", "--resume", "runs/x", *words)[0] == 2
    assert "no run folder 'runs/x'" in opsd(capsys, "train", "--resume", "runs/x")[2]


def test_eval_asks_for_a_model_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a model or a run first" in opsd(capsys, "eval", "dataset=gsm8k")[2]
    assert "dataset is required" in opsd(capsys, "eval", "tiny")[2]
    assert "the model is the first word" in opsd(capsys, "eval", "tiny", "model=hf", "dataset=gsm8k")[2]
    code, _, err = opsd(capsys, "eval", "./nowhere", "dataset=gsm8k")
    assert (code, err) == (2, "opsd: ./nowhere: neither a run folder nor a model folder\n")


def test_the_first_word_of_eval_is_a_run_a_folder_an_option_or_a_hub_id() -> None:
    folders = find_folders()
    model = Path("runs/one/model")
    model.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_target("runs/one/model", folders)
    (model / "config.json").write_text("{}")
    assert find_target("runs/one/model", folders).frozen is None
    Path("runs/one/config.yaml").write_text("run: {name: one}\n")
    for word in ("runs/one", "one", "runs/one/model"):
        target = find_target(word, folders)
        assert target.words == ("model=hf", f"model.path='{model.absolute()}'", "lora=none")
        assert (target.frozen, target.name) == ({"run": {"name": "one"}}, "one")
    assert find_target("tiny", folders).words == ("model=tiny", "lora=none")
    # An adapter that was merged into float32 weights, because half precision would lose it, is measured in them.
    (model / "adapter").mkdir()
    (model / "config.json").write_text('{"dtype": "float32"}')
    assert find_target("one", folders).words[3:] == ("model.dtype=float32",)
    assert find_target("Qwen/Qwen3-1.7B", folders).words == ("model=hf", "model.path='Qwen/Qwen3-1.7B'", "lora=none")
    Path("runs/two").mkdir()
    Path("runs/two/config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="has no model yet"):
        find_target("two", folders)


def test_a_run_is_named_after_recipe_method_and_model() -> None:
    assert name_hint({"recipe": "gsm8k", "method": "opsd", "model": "tiny"}) == "gsm8k-opsd-tiny"
    assert name_hint({"recipe": None, "dataset": "jsonl", "method": "sft", "model": "hf"}) == "jsonl-sft-hf"


@pytest.mark.parametrize("text", ["../../x", "/etc/passwd", "a/../b", "..", "", "~", "a b=c,d", "x" * 300, "\n", "-rf"])
def test_a_members_name_never_leaves_the_sweeps_folder(text: str) -> None:
    name = safe_name(text)
    root = Path("sweep").absolute()
    assert (root / name).resolve().parent == root
    assert 0 < len(name) <= 60
    assert not name.startswith(("-", "."))


def test_the_exit_code_of_a_sweep_is_the_worst_of_its_members() -> None:
    assert worst_code([0, 0]) == 0
    assert worst_code([0, 2, 0]) == 2
    assert worst_code([2, 4, 3]) == 3
    assert worst_code([0, 130, -1]) == 130


def evaluation(step: int, accuracy: float, *, role: str = "student", split: str = "test") -> dict:
    interval = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    counts = {"problems": 100, "correct": round(100 * accuracy), "length_mean": 9.0, "truncated": 0.0, "seconds": 1.0}
    return {"step": step, "split": split, "role": role, **interval, **counts}


def test_the_table_of_a_sweep_says_what_each_member_learnt_kept_and_cost() -> None:
    Path("sweep/0_a").mkdir(parents=True)
    log = EventLog(Path("sweep/0_a/events.jsonl"))
    log.write("evaluation", **evaluation(0, 0.25))
    log.write("evaluation", **evaluation(0, 0.9, split="retention"))
    log.write("step", step=1, metrics={"tokens/completion": 1234.0, "time/step": 2.0, "memory/peak_gib": 1.0})
    log.write("evaluation", **evaluation(1, 0.8, split="retention"))
    log.write("evaluation", **evaluation(1, 0.5))
    log.write("evaluation", **evaluation(1, 0.95, role="teacher"))
    results = [Result("0_a", ("lr=1",), 0), Result("1_b", ("lr=2",), 4), Result("2_c", ("lr=3",), -1)]
    lines = table_lines(results, Path("sweep").absolute())
    columns = [column.strip() for column in re.split(r"\s{2,}", lines[0]) if column.strip()]
    assert columns == ["before", "after", "teacher after", "retention", "tokens", "seconds", "status", "folder"]
    for words in ("25.0 % [15.0, 35.0]", "50.0 % [40.0, 60.0]", "95.0 %", "90.0 % -> 80.0 %", "1,234", "done"):
        assert words in lines[1]
    assert "failed, exit code 4" in lines[2]
    assert "not run" in lines[3]


def test_the_table_leaves_out_what_no_member_has() -> None:
    lines = table_lines([Result("0_a", ("lr=1",), 0)], Path("sweep").absolute())
    assert lines[0].split() == ["status", "folder"]
    assert lines[1].split() == ["lr=1", "done", "sweep/0_a"]


def test_a_sweeps_folder_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/mine").mkdir(parents=True)
    line = ("train", "-m", "recipe=quickstart", "train.steps=1,2")
    assert "never overwritten" in opsd(capsys, *line, "run.name=mine")[2]
    assert "never overwritten" in opsd(capsys, *line, "hydra.sweep.dir=runs/mine")[2]
    assert not any(Path("runs/mine").iterdir())


def test_a_run_folder_that_exists_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/mine").mkdir(parents=True)
    code, out, err = opsd(capsys, "train", "recipe=quickstart", "run.name=mine")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "never overwritten" in line
    assert "opsd train --resume runs/mine" in line
    assert not any(Path("runs/mine").iterdir())


def test_eval_finds_a_runs_data_where_the_run_was_started() -> None:
    model, started_in = Path("runs/one/model"), Path("elsewhere").absolute()
    for folder in (model, started_in / "data"):
        folder.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    Path("runs/one/config.yaml").write_text("dataset: {path: data}\n")
    Path("runs/one/command.json").write_text(json.dumps({"cwd": str(started_in)}))
    frozen = find_target("one", find_folders()).frozen
    assert frozen == {"dataset": {"path": str(started_in / "data")}}
