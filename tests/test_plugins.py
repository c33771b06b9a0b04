"""--plugin FILE: the user's own parts, named by the person who types and by nobody else."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from launcher_support import WORKER
from recipe_support import config_of, only_problem_of, opsd, write_recipe

from opsd_cli.commands.members import Runner
from opsd_cli.commands.new import skeleton
from opsd_cli.data.token_rules import Completion, checked_weights
from opsd_cli.insight.history import MEMBERS
from opsd_cli.launch import launchers
from opsd_cli.run.folder import RunFolder, refuse_links
from opsd_cli.run.plugin_copies import copy_plugins, recorded_plugins
from opsd_cli.settings.command_line import parse_line
from opsd_cli.settings.compose import Job, session
from opsd_cli.settings.errors import ConfigError, PluginError
from opsd_cli.settings.plugin_files import plugin_faults, use_copies, use_plugins, used_plugins, words_for_ranks
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.registry import plugin_names
from opsd_cli.settings.typed_config import plain_tree

MINE = '''
"""Parts of my own."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from opsd_cli.data.answers import Grade
from opsd_cli.data.graders import Grader
from opsd_cli.loss.divergences import AlignedTokens, Entrywise
from opsd_cli.settings.registry import plugin


@plugin("divergence", "halves")
class Halves(Entrywise):
    """Half the forward KL."""

    fails: bool

    def entries(self, tokens: AlignedTokens):
        if self.fails:
            raise KeyError("broken")
        probs_nV = tokens.teacher_probs_nV
        return 0.5 * probs_nV * tokens.log_ratio_nV, -0.5 * probs_nV


@plugin("token_rule", "digits")
class Digits:
    """Only tokens with a digit in them count."""

    factor: Annotated[float, Field(ge=0)]

    def weights(self, completion) -> list[float]:
        return [self.factor if any(map(str.isdigit, token)) else 0.0 for token in completion.tokens]


@plugin("grader", "lenient")
class Lenient(Grader):
    """Everything is right."""

    def grade(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[Grade]:
        return [Grade(correct=True, stated=True) for _ in pairs]
'''
CHOICES = ("recipe=quickstart", "divergence=halves", "token_rule=digits", "grader=lenient")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder: a plug-in file and its recipes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    write_recipe(tmp_path / "recipes", "divergence/halves", "# Half\nname: halves\nfails: false\n")
    write_recipe(tmp_path / "recipes", "token_rule/digits", "# Digits\nname: digits\nfactor: 1.0\n")
    write_recipe(tmp_path / "recipes", "grader/lenient", "# All right\nname: lenient\n")
    yield tmp_path / "mine.py"
    use_plugins([])


def test_a_plug_in_is_known_while_it_is_typed_and_forgotten_after(mine: Path) -> None:
    assert "is not one of" in only_problem_of(*CHOICES[:2])
    assert "--plugin FILE" in only_problem_of(*CHOICES[:2])
    (used,) = use_plugins(["mine.py", mine])
    config = config_of(*CHOICES, "token_rule.factor=2.5")
    assert (type(config.divergence).__module__, config.token_rule.factor) == (used.module, 2.5)
    use_plugins([])
    assert "halves" not in plugin_names("divergence")


def test_a_part_that_a_plug_in_redefines_is_refused_with_its_line(mine: Path) -> None:
    mine.write_text(MINE.replace('"halves"', '"jsd"'))
    with pytest.raises(PluginError, match=r"mine\.py:\d+: divergence=jsd is taken by opsd_cli\.loss"):
        use_plugins([mine])
    use_plugins([])
    assert "jsd" in plugin_names("divergence")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ndef f(:\n", r"^mine\.py:2: SyntaxError: "),
        ("import numpy\n\n1 / 0\n", r"^mine\.py:3: ZeroDivisionError: division by zero$"),
        ("import no_such_module\n", r"^mine\.py:1: ModuleNotFoundError: "),
        ("def f():\n    raise KeyError\nf()\n", r"^mine\.py:2, in f: KeyError$"),
    ],
)
def test_a_fault_of_a_plug_in_is_one_line_with_its_place(mine: Path, text: str, told: str) -> None:
    mine.write_text(text)
    with pytest.raises(PluginError, match=told):
        use_plugins([mine])


def test_an_error_that_did_not_come_through_a_plug_in_passes(mine: Path) -> None:
    use_plugins([mine])
    with pytest.raises(KeyError), plugin_faults():
        raise KeyError("ours")


@pytest.mark.parametrize("words", [("--plugin", "nope.py"), ("--plugin", "recipes")])
def test_what_is_no_plug_in_file_is_refused(mine: Path, capsys: pytest.CaptureFixture[str], words: tuple[str]) -> None:
    code, _, err = opsd(capsys, "train", "recipe=quickstart", *words)
    assert code == 2
    assert err.count("\n") == 1
    assert words[1] in err


def test_a_recipe_cannot_name_a_plug_in(mine: Path) -> None:
    write_recipe(mine.parent / "recipes", "recipe/hostile", "# @package _global_\n# x\nplugin: mine.py\n")
    assert "plugin" in only_problem_of("recipe=hostile", "model=tiny", "dataset=arithmetic")
    assert used_plugins() == ()


def test_a_rank_runs_a_copy_only_if_it_is_what_the_launcher_names(mine: Path) -> None:
    use_plugins([mine])
    folder, words = RunFolder(mine.parent / "run"), words_for_ranks()
    folder.path.mkdir()
    (record,) = copy_plugins(folder)
    folder.command.write_text(json.dumps({"plugins": [record]}))
    assert recorded_plugins(folder) == {record["sha256"]: str(mine)}
    use_plugins([])
    use_copies(folder.plugins, words, typed=recorded_plugins(folder))
    assert used_plugins()[0].path == mine
    (folder.plugins / record["copy"]).write_text(MINE + "\n")
    with pytest.raises(ConfigError, match="was changed after the run started"):
        use_copies(folder.plugins, words, typed={})


def test_a_run_folder_whose_plug_ins_are_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plugins").symlink_to(tmp_path.parent)
    with pytest.raises(ConfigError, match="symbolic link"):
        refuse_links(tmp_path)


@pytest.mark.parametrize(("weights", "told"), [([1.0], "1 weights for a completion of 2"), ([1.0, -1.0], "-1.0")])
def test_a_token_rule_with_wrong_weights_is_refused(weights: list[float], told: str) -> None:
    class Rule:
        def weights(self, completion: Completion) -> list[float]:
            return weights

    completion = Completion(None, (5, 6), ("a", "b"), "ab", True, "stop")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=told):
        checked_weights(Rule(), completion, name="rule")


@pytest.mark.slow
def test_a_member_that_runs_in_another_process_is_given_the_plug_ins_as_they_were_read(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hydra/launcher=joblib hands it on: pickled, to a process that has run no plug-in."""
    (mine.parent / "worker.py").write_text(WORKER)
    monkeypatch.setattr(launchers, "WORKER", ("worker.py",))
    use_plugins([mine])
    with session(find_folders()):
        line, _ = parse_line(CHOICES, find_folders())
    job = Job(plain_tree(config_of(*CHOICES)), 0, (), None, {})
    sent = pickle.dumps((Runner(line, mine.parent, 1, task="train", command=()), job))
    use_plugins([])
    mine.write_text("raise SystemExit('read again')")
    runner, job = pickle.loads(sent)
    runner.run(job)
    (member,) = (mine.parent / MEMBERS).read_text().splitlines()
    assert json.loads(member)["code"] == 0
    (copy,) = (mine.parent / json.loads(member)["name"] / "plugins").iterdir()
    assert copy.read_text() == MINE


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_every_member_of_a_sweep_has_the_plug_ins(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    if launcher == "joblib":  # its processes start real ranks
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed")
    (mine.parent / "worker.py").write_text(WORKER)
    monkeypatch.setattr(launchers, "WORKER", ("worker.py",))
    words = ("recipe=quickstart", "divergence=halves", "run.seed=0,1", f"hydra/launcher={launcher}", "run.name=s",
             "train.steps=1", "train.problems_per_step=2", "eval.problems=0")  # fmt: skip
    code, _, err = opsd(capsys, "train", "-m", *words, "--plugin", "mine.py")
    assert code == 0, err
    assert [copy.read_text() for copy in Path("runs/s").glob("*/plugins/mine-*.py")] == [MINE, MINE]


@pytest.mark.slow
def test_two_ranks_draw_with_a_sampler_of_the_users_own_from_a_dataset_of_the_users_own(mine: Path) -> None:
    for kind, name in (("dataset", "sums"), ("sampler", "brief")):
        for path, text in skeleton(kind, name).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    words = ("model=tiny", "dataset=sums", "sampler=brief", "token_rule=digits", "launcher.ranks=2", "train.steps=2",
             "train.problems_per_step=4", "eval.problems=4", "eval.teacher_prompt=false", "run.name=r",
             "sampling.max_completion_tokens=24", "loss.mask_truncated=false")  # fmt: skip
    files = [word for name in ("mine", "sums", "brief") for word in ("--plugin", f"{name}.py")]
    done = support.opsd("train", *words, *files, cwd=mine.parent)
    assert done.returncode == 0, done.stderr
    assert "opsd eval runs/r/model --plugin mine.py --plugin sums.py --plugin brief.py" in done.stdout
    run = RunFolder(mine.parent / "runs" / "r")
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    (started,) = (event for event in events if event["kind"] == "run_started")
    steps = [event["metrics"] for event in events if event["kind"] == "step"]
    assert (started["ranks"], len(steps)) == (2, 2)
    assert all(step["tokens/completion"] > 0 for step in steps)
    assert json.loads(run.samples.read_text().splitlines()[0])["problem"].startswith("sum-")


@pytest.mark.slow
def test_a_run_with_plug_ins_trains_and_resumes_only_when_they_are_typed_again(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", *CHOICES, "run.name=r", "train.steps=1", "optim.schedule=constant", "train.problems_per_step=4",
             "eval.problems=4", "dataset.retention_problems=0")  # fmt: skip
    first = support.opsd(*words, "--plugin", "mine.py", cwd=mine.parent)
    assert first.returncode == 0, first.stderr
    run = mine.parent / "runs" / "r"
    (copy,) = (run / "plugins").iterdir()
    assert copy.read_text() == MINE
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (step,) = [event["metrics"] for event in events if event["kind"] == "step"]
    assert step["rollout/accuracy"] == 1.0
    assert step["loss/objective"] == pytest.approx(0.5 * step["kl/forward"], rel=1e-5)
    assert step["tokens/scored"] > 0

    resume = ("train", "--resume", "runs/r", "train.steps=2")
    for command in (resume, ("eval", "runs/r")):
        code, _, err = opsd(capsys, *command)
        assert (code, f"--plugin {mine}" in err) == (2, True)
    mine.write_text(MINE + "\n# changed\n")
    code, _, err = opsd(capsys, *resume, "--plugin", "mine.py")
    assert (code, "--accept-changed-plugin" in err) == (2, True)
    accepted = support.opsd(*resume, "--plugin", "mine.py", "--accept-changed-plugin", cwd=mine.parent)
    assert accepted.returncode == 0, accepted.stderr
    assert len(list((run / "plugins").iterdir())) == 2


@pytest.mark.slow
def test_a_fault_in_a_rank_names_the_line_of_the_users_file(mine: Path) -> None:
    failed = support.opsd(
        "train", *CHOICES, "divergence.fails=true", "--dry-run", "--plugin", "mine.py", cwd=mine.parent
    )
    assert failed.returncode == 2
    line = MINE.splitlines().index('            raise KeyError("broken")') + 1
    assert f"mine.py:{line}, in entries: KeyError: 'broken'" in failed.stderr
    assert "bug in opsd" not in failed.stderr
