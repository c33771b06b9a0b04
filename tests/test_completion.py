"""Tab in a shell, and recipes of one's own: completed, edited, validated, described for editors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_support import make_run
from support import REPOSITORY

import opsd_cli.plugins  # noqa: F401
from opsd_cli.cli import COMMANDS, main
from opsd_cli.commands.completion import SCRIPTS, candidates
from opsd_cli.settings.recipe_files import GROUPS, builtin_folder, find_folders
from opsd_cli.settings.schema import schema_of


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tab_knows_commands_flags_options_settings_and_runs() -> None:
    make_run(Path("runs"), "mine")
    assert set(COMMANDS) <= set(candidates("opsd "))
    assert candidates("opsd tra") == ["train"]
    assert candidates("opsd train recipe=quick") == ["recipe=quickstart"]
    assert candidates("opsd train divergence=js") == ["divergence=jsd"]
    assert candidates("opsd train train.ste") == ["train.steps="]
    assert candidates("opsd train teacher.ev") == ["teacher.every="]
    assert "optim." in candidates("opsd train op")
    assert candidates("opsd watch runs/m") == ["runs/mine"]
    assert candidates("opsd train --resume runs/m") == ["runs/mine"]
    assert candidates("opsd eval --ste") == ["--step"]
    assert "--merge" in candidates("opsd export runs/mine out --")
    assert candidates("opsd recipes val") == ["validate"]
    assert candidates("opsd nonsense x") == []
    assert candidates('opsd generate tiny "an open quote') == []


def test_every_command_tells_its_flags() -> None:
    for command in COMMANDS:
        assert "--help" in candidates(f"opsd {command} --h"), command


def test_what_tab_runs_imports_nothing_slow() -> None:
    code = (
        "import sys; from opsd_cli.cli import main\n"
        "for line in ('opsd train recipe=', 'opsd eval --'): main(['completion', '--line', line])\n"
        "print({'torch', 'hydra', 'transformers', 'rich', 'omegaconf', 'pydantic'} & set(sys.modules))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_shell_reads_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.slow
def test_bash_completes_behind_an_equals_sign() -> None:
    """As bash calls the function: it takes `=` for the end of a word."""
    opsd = f'opsd() {{ "{sys.executable}" -m opsd_cli "$@"; }}\n'
    ask = (
        f"{opsd}{SCRIPTS['bash']}"
        "COMP_WORDBREAKS=$' \\t\\n\"=:'; COMP_LINE='opsd train divergence=js'; COMP_POINT=${#COMP_LINE}; _opsd\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    made = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, env=environ)
    assert made.stdout.strip() == "jsd"


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(("line", "word"), [("opsd tra", "train"), ("opsd train recipe=quick", "recipe=quickstart")])
def test_fish_completes(line: str, word: str) -> None:
    ask = f"function opsd; '{sys.executable}' -m opsd_cli $argv; end\n{SCRIPTS['fish']}complete -C '{line}'\n"
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    made = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True, env=environ)
    assert made.stdout.split() == [word]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes(tmp_path: Path) -> None:
    """A person's zsh, on a terminal of its own: Tab is pressed twice in a line, which is then run."""
    setup = (
        "autoload -Uz compinit; compinit -u -D\n"
        f'opsd() {{ [[ $1 == completion ]] && \'{sys.executable}\' -m opsd_cli "$@" || print -r -- "<$*>" }}\n'
        f"{SCRIPTS['zsh']}"
    )
    (tmp_path / "setup.zsh").write_text(setup)
    drive = (
        "zmodload zsh/zpty; zpty person zsh -f -i; zpty -w person 'source setup.zsh; print -r rea\"\"dy'\n"
        "zpty -r -m person said '*ready*'\n"
        "zpty -w -n person $'opsd tra\\tdivergence=js\\t\\n'; zpty -r -m person said '*<*>*'; print -r -- $said\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "dumb"}
    made = subprocess.run(
        ["zsh", "-f", "-c", drive], capture_output=True, text=True, check=True, env=environ, cwd=tmp_path, timeout=60
    )
    assert "<train divergence=jsd>" in made.stdout


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "name a shell: opsd completion bash|zsh|fish" in capsys.readouterr().err


@pytest.mark.parametrize("group", GROUPS)
def test_a_schema_knows_every_key_that_opsds_own_files_have(group: str) -> None:
    schema = schema_of(group, builtin_folder())
    assert "$ref" not in json.dumps(schema)
    described = 0
    for option, file in find_folders().files[group].items():
        tree = yaml.safe_load(file.read_text("utf-8")) or {}
        for key, value in tree.items():
            part = schema["properties"][key]  # or the file has a key that no editor would know
            described += "description" in part
            if group in ("recipe", "method") and isinstance(value, dict):
                assert value.keys() <= part["properties"].keys(), (option, key)
    assert described or group in ("grader", "token_rule", "track")


def test_a_copy_names_its_schema_and_is_edited_and_validated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISUAL", f"{sys.executable} -c pass")
    assert main(["recipes", "edit", "quickstart"]) == 0
    copy = Path("recipes/recipe/quickstart.yaml")
    assert copy.read_text().splitlines()[1] == "# yaml-language-server: $schema=../.schema/recipe.json"
    assert json.loads(Path("recipes/.schema/recipe.json").read_text())["properties"]["train"]
    assert "recipe=quickstart is valid" in capsys.readouterr().out
    copy.write_text(copy.read_text().replace("steps:", "setps:"))
    assert main(["recipes", "validate"]) == 2
    assert "unknown key 'train.setps' - did you mean 'train.steps'?" in capsys.readouterr().err
    monkeypatch.setenv("VISUAL", "no-such-editor")
    assert main(["recipes", "edit", "quickstart"]) == 3
    assert "no-such-editor cannot be started: set EDITOR" in capsys.readouterr().err
    monkeypatch.setenv("VISUAL", str(Path.cwd()))  # no program
    assert main(["recipes", "edit", "quickstart"]) == 3
    assert "cannot be started: set EDITOR" in capsys.readouterr().err
    monkeypatch.setenv("VISUAL", "vi '")
    assert main(["recipes", "edit", "quickstart"]) == 3
    assert "which is no command (No closing quotation); set EDITOR to your editor" in capsys.readouterr().err
