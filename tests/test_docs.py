"""The documentation cannot rot: its commands parse and compose, its links lead somewhere, what is made from the program
is up to date, its code runs, and the page about adding a part adds one."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import yaml
from recipe_support import config_of, opsd, problems_of, sections_of_method, write_recipe
from run_support import make_run, make_sweep
from support import REPOSITORY, TESTS, run_ranks

from opsd_cli.checks import check_config
from opsd_cli.cli import COMMANDS, main
from opsd_cli.commands.evaluate import find_target
from opsd_cli.commands.new import DESCRIPTIONS
from opsd_cli.commands.recipes import other_frameworks, other_names
from opsd_cli.commands.train import _flags
from opsd_cli.preflight import check
from opsd_cli.run.events import EVENTS, METRICS, OPTIONAL
from opsd_cli.run.summary import summarise
from opsd_cli.settings.compose import compose, resolve, session
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.recipe_files import find_folders, written_out
from opsd_cli.settings.registry import plugin_names
from opsd_cli.settings.resume_rules import MAY_CHANGE, may_change
from opsd_cli.settings.typed_config import plain_tree, typed_config

sys.path.insert(0, str(REPOSITORY / "scripts"))

from make_config_reference import generated
from make_file_tree import PAGE, with_tree
from make_site import CHAPTERS, site_path

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
ADDING = REPOSITORY / "docs" / "adding.md"
TINY = REPOSITORY / "opsd_cli" / "assets" / "tiny"
FILES = find_folders().files
STARTERS = ("srun", "torchrun")  # words that may stand before opsd


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Every `opsd ...` of the shell blocks, and every one in the running text that has more than a command."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines += [text for text in re.findall(r"`(opsd \w+ [^`]+)`", prose) if "..." not in text]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if "opsd" in words and (words[0] == "opsd" or words[0] in STARTERS):
            found.append(shlex.join(words[words.index("opsd") :]))
    return found


COMMAND_LINES = {line: name_of(page) for page in PAGES if page != ADDING for line in commands(page)}


def composes(words: list[str], *, multirun: bool = False) -> None:
    """A command line's overrides pass every check that needs no torch. NAME stands for a recipe where one is meant."""
    words = [word.replace("recipe=NAME", "recipe=quickstart") for word in words]
    assert without_a_missing_vllm(problems_of(*words, multirun=multirun)) == []


def without_a_missing_vllm(problems: Iterable[str]) -> list[str]:
    """An environment of its own has it."""
    return [problem for problem in problems if "vLLM, which is not installed" not in problem]


def check_train(words: list[str]) -> None:
    given = _flags().read([*words, "runs/NAME"] if words[-1:] == ["--resume"] else words)
    if given.help or given.resume:
        keys = [word.split("=")[0] for word in given.words]
        assert given.resume is None or all(may_change(key) or f"{key}.*" in MAY_CHANGE for key in keys)
        return
    # Hydra's plug-ins for sweeps need not be installed here.
    composes([word for word in given.words if not word.startswith("hydra")], multirun=given.multirun)


def check_eval(words: list[str]) -> None:
    target, *others = words
    overrides = [word for word in others if "=" in word]
    if target == "--resume":
        assert others == ["runs/eval-NAME-001"]
    elif target == "OUT" or "--tasks" in others:
        assert overrides == []
    elif target.startswith("runs/"):
        composes(["recipe=quickstart", *overrides])
    else:
        check([*find_target(target, find_folders()).words, *overrides], find_folders())


def check_recipes(words: list[str]) -> None:
    assert words == [] or words[0] in ("show", "copy", "edit", "validate", "schema")
    if len(words) > 1 and words[1] not in ("NAME", "GROUP", "METHOD"):
        known = {name for group, options in FILES.items() for name in (group, *options)}
        known |= {f"{group}/{option}" for group, options in FILES.items() for option in options}
        assert words[1] in known


def check_new(words: list[str]) -> None:
    kind, _ = words
    assert kind in (*DESCRIPTIONS, "KIND")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", COMMAND_LINES)
@pytest.mark.slow
def test_every_command_of_the_documentation_parses_and_composes(line: str) -> None:
    write_recipe(Path("recipes"), "recipe/fractions", fractions()[0])
    write_recipe(Path("recipes"), "dataset/fractions", fractions()[1])
    _, *words = shlex.split(line)
    if not words or words[0] in ("--help", "--version", "COMMAND"):
        return
    command, *rest = words
    assert command in COMMANDS
    # One needs a package that is not installed here; the other a file that the page about adding a part makes.
    if "--to" in words or "--plugin" in words:
        return
    if command in ("inspect", "doctor", "probe", "compare"):  # their settings are those of train
        own = ("--", "arms=", "seeds=")
        given = [word for word in rest if "=" in word and not word.startswith(own)]
        return composes(given if given and "=" in rest[0] else ["recipe=quickstart"])
    if command in ("runs", "report"):  # cheap enough to run
        for name in ("NAME", "A", "B"):
            make_run(Path("runs"), name)
        make_sweep(Path("runs/SWEEP"), {"0": {}, "1": {"outcome": "failed"}})
        assert main(words) == ExitCode.DONE or "--check" in words  # which answers by its code
        return
    if command == "plan":  # cheap enough to run; it may say that something does not fit
        assert main(words) in (ExitCode.DONE, ExitCode.CHANGE_SOMETHING)
        return
    checks = {"train": check_train, "eval": check_eval, "recipes": check_recipes, "new": check_new}
    if command in checks:
        checks[command](rest)


def fractions() -> list[str]:
    """The recipe, the dataset and the token rules that docs/recipes.md shows how to write."""
    return blocks(REPOSITORY / "docs" / "recipes.md", "yaml")


def test_the_recipe_that_the_documentation_writes_composes() -> None:
    recipe, dataset, tokens = fractions()
    write_recipe(Path("recipes"), "recipe/fractions", recipe.partition("\n")[2])
    write_recipe(Path("recipes"), "dataset/fractions", dataset)
    write_recipe(Path("recipes"), "tokens/late", tokens)
    composes(["recipe=fractions", "tokens=late"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        if heading:
            assert heading in headings(file), f"{name_of(page)}: {target}"


def cells_of_moving() -> list[str]:
    """What stands in the column `opsd` of the tables for people who come from another trainer."""
    rows = re.findall(r"^\| .*$", (REPOSITORY / "docs" / "moving.md").read_text("utf-8"), flags=re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[1])]
    return sorted({span for span in spans if re.match(r"'?[\w.]+=", span)})


@pytest.mark.parametrize("words", cells_of_moving())
def test_every_setting_of_the_page_about_moving_composes(words: str) -> None:
    given = shlex.split(words)
    beside = ["sampler=vllm"] if words.startswith(("sampler.memory_share", "sampler.tensor_parallel")) else []
    beside += ["context=none"] if words.startswith("teacher=external") else []
    start = [] if words.startswith("recipe=") else ["recipe=jsonl"]
    found = problems_of(*start, "dataset.path=problems.jsonl", *beside, *given)
    assert without_a_missing_vllm(found) == []


def test_the_site_holds_every_page_in_one_chapter() -> None:
    """`scripts/make_site.py` builds it; a page without a chapter could only be found by its address."""
    placed = sorted(f"{name}.md" for names in CHAPTERS.values() for name in names)
    there = (site_path(page) for page in PAGES)
    assert placed == sorted(page for page in there if page not in (None, "index.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_parser", reason="the extra `docs` is not installed")
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "make_site.py"), str(tmp_path / "site")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "moving.html").is_file()


def test_every_test_that_a_page_names_exists() -> None:
    named = {name_of(page): re.findall(r"(tests/\w+\.py)::(\w+)", page.read_text("utf-8")) for page in PAGES}
    for page, tests in named.items():
        for file, test in tests:
            functions = [node for node in ast.walk(parsed(REPOSITORY / file)) if isinstance(node, ast.FunctionDef)]
            assert test in {node.name for node in functions}, f"{page}: {file}::{test}"
    assert len(named["docs/reliability.md"]) > 100
    assert len(named["SECURITY.md"]) > 20


def test_every_failure_mode_has_a_test() -> None:
    section = (REPOSITORY / "docs" / "reliability.md").read_text("utf-8").partition("## Failure modes")[2]
    rows = re.findall(r"^\| .*$", section.partition("\n## ")[0], re.MULTILINE)
    faults = [row for row in rows if not row.startswith("| fault |")]
    assert len(faults) >= 59
    assert all("::test_" in row for row in faults)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def headings(page: Path) -> set[str]:
    """The anchors of a page, as hosts of Markdown make them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_what_is_made_from_the_program_is_up_to_date() -> None:
    for path, text in generated():
        assert path.read_text("utf-8") == text, f"{name_of(path)}: run python scripts/make_config_reference.py"


def test_the_tree_of_files_is_up_to_date_and_says_a_word_about_every_file() -> None:
    page = PAGE.read_text("utf-8")
    assert page == with_tree(page), "run python scripts/make_file_tree.py"


@pytest.mark.parametrize("group", [group for group in FILES if group not in ("recipe", "method")])
def test_every_option_of_the_reference_can_be_chosen(group: str) -> None:
    reference = (REPOSITORY / "docs" / "configuration.md").read_text("utf-8")
    assert all(f"| `{group}={option}` |" in reference for option in FILES[group])
    meant = (
        "is required",
        "needs a teacher",
        "uses no teacher",
        "train.rollouts_per_problem",
        "not installed",
    )
    # That Hydra composes each is test_recipes'; here each stands in one composed tree.
    base = plain_tree(config_of("recipe=quickstart"))
    for option in FILES[group]:
        section = yaml.safe_load(written_out(find_folders(), group, option))
        problems = problems_in(resolve(base | {group: section})[0])
        assert all(any(words in problem for words in meant) for problem in problems), (option, problems)


def problems_in(tree: dict) -> tuple[str, ...]:
    try:
        check_config(typed_config(tree))
    except ConfigError as error:
        return error.problems
    return ()


def test_every_method_event_metric_and_exit_code_is_explained() -> None:
    methods = (REPOSITORY / "docs" / "methods.md").read_text("utf-8")
    assert all(f"`{method}`" in methods for method in FILES["method"])
    outputs = (REPOSITORY / "docs" / "outputs.md").read_text("utf-8")
    for kind, fields in EVENTS.items():
        (row,) = re.findall(rf"^\| `{kind}` \|.*$", outputs, flags=re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == {kind, *fields, *OPTIONAL.get(kind, ())}
    assert all(f"| `{name}` | " in outputs for name in METRICS)
    assert all(f"`{key}`" in outputs for key in summarise([], command={}))
    launching = (REPOSITORY / "docs" / "launching.md").read_text("utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \|", launching.partition("## Exit codes")[2], flags=re.MULTILINE)
    assert [int(code) for code in ",".join(rows).split(",")] == [int(code) for code in ExitCode]
    assert all(f"`{key}`" in launching for key in MAY_CHANGE)


def test_every_message_of_the_troubleshooting_page_is_one_of_the_programs() -> None:
    program = "\n".join(
        node.value
        for path in (REPOSITORY / "opsd_cli").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?`[^|]*) \| ", page, flags=re.MULTILINE)
    assert len(rows) > 30
    for message in (text for row in rows for text in re.findall(r"(?<!`)`(?!`)([^`]+)`(?!`)", row)):
        for part in message.removeprefix("FILE:LINE:").split("..."):
            assert part.strip(" ;:'-?()") in program, message


def test_the_readmes_snippet_loads_and_asks_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks(REPOSITORY / "README.md", "python")
    exec(compile(snippet.replace("runs/NAME/model", str(TINY)), "README.md", "exec"), {})
    assert "####" in capsys.readouterr().out


def test_the_snippet_that_reads_events_reads_them() -> None:
    (snippet,) = blocks(REPOSITORY / "docs" / "outputs.md", "python")
    Path("events.jsonl").write_text(
        '{"kind": "step", "step": 1, "metrics": {"loss/objective": 0.5}}\n{"kind": "warning", "message": ""}\n'
    )
    names: dict[str, object] = {}
    exec(compile(snippet.replace("runs/NAME/", ""), "outputs.md", "exec"), names)
    assert names["objective"] == [0.5]


@pytest.mark.slow
def test_the_page_about_adding_a_part_adds_one(tmp_path: Path) -> None:
    files = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", ADDING.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for name, text in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    lines = [shlex.split(line)[1:] for line in commands(ADDING) if not re.search(r"\b[A-Z]{2,}\b", line)]
    assert (len(files), len(lines)) == (7, 12)
    (tmp_path / "commands.json").write_text(json.dumps(lines))
    (output,) = run_ranks([TESTS / "adding_page_ranks.py", tmp_path], 1)
    found = json.loads(output.strip().splitlines()[-1])
    both, limited = found["step 0"], found["step 1"]
    assert both["loss/objective"] == pytest.approx(0.5 * both["kl/forward"] + 0.5 * both["kl/reverse"], rel=1e-4)
    assert 0 < limited["loss/objective"] <= 0.1 < limited["kl/forward"]
    assert both["optim/grad_norm"] > 0 < limited["optim/grad_norm"]


@pytest.mark.slow
def test_a_method_is_shown_with_its_names_in_other_frameworks(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(capsys, "recipes", "show", "opsd_paper")
    assert (code, err) == (0, "")
    assert out.startswith(written_out(find_folders(), "method", "opsd_paper"))
    said = " ".join(out.split())
    for words in ("--jsd_token_clip 0.05", "distillation_alpha=0.0", "forward_kl_topk", "jsd_beta=0.0", "--lmbda 1"):
        assert words in said
    assert all(framework in said for framework in other_frameworks()[0].values())
    assert "--ema_decay 0.99;" in " ".join(opsd(capsys, "recipes", "show", "method/sdft")[1].split())


@pytest.mark.slow
def test_the_names_of_a_method_are_comments_of_a_screens_width() -> None:
    with session(find_folders()):
        base, _ = compose(["model=tiny", "dataset=arithmetic"])
    trees = [base | sections_of_method(method) for method in FILES["method"]]
    for lines in map(other_names, trees):
        assert len(lines) > len(other_frameworks()[0])
        assert all(line.startswith("#") and len(line) <= 120 and "{" not in line for line in lines)


def test_every_part_of_a_method_has_a_row_of_names() -> None:
    titles = {row.title for row in other_frameworks()[1]}
    plain = {"teacher=none"}
    assert {f"divergence={name}" for name in plugin_names("divergence")} <= titles
    assert {f"teacher={name}" for name in plugin_names("teacher")} - plain <= titles
    assert {f"clip.kind={name}" for name in FILES["clip"] if name != "none"} <= titles
