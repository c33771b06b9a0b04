"""Who may import whom, read from the source, and what a command may load before it starts ranks."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opsd_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "peft", "math_verify")
SLOW = (*HEAVY, "hydra", "omegaconf", "rich", "pydantic")

TORCH_FREE = (
    "__init__", "__main__", "cli", "commands", "settings", "safety", "launch", "run", "ui", "plugins", "preflight",
    "checks", "data.datasets", "data.hub", "data.arithmetic", "data.problems", "data.contexts", "loss.divergences",
    "loss.clip", "loss.support", "teachers", "sampling.samplers", "sampling.vllm",
)  # fmt: skip
"""Modules (and packages) that the process of a command imports: nothing heavy at their top level."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def belongs(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}.")


def imports(tree: ast.AST, *, everywhere: bool) -> Iterator[str]:
    """Imported modules, with what is taken from them; without `everywhere` those of the top level that are executed."""
    for node in ast.walk(tree) if everywhere else executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from executed(child)


def lint_imports(folder: Path) -> tuple[int, str]:
    """The contracts of pyproject.toml on the package in a folder: exit code and report."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "300"}
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    ended = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def test_imports_keep_the_contracts() -> None:
    code, report = lint_imports(PACKAGE.parent)
    assert code == 0, report


PLANTED = {
    "run/planted": "",
    "settings/planted": "import opsd_cli.run.planted",
    "data/planted": "def later():\n    from opsd_cli.run import planted",
    "loss/planted": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from opsd_cli.run.planted import Run",
    "loss/types": "from opsd_cli.loss import planted",
    "engine/planted": "import opsd_cli.loss.types",
    "training/planted": "import deepspeed",
    "safety/planted": "import opsd_cli.safety.planted_too",
    "safety/planted_too": "import opsd_cli.safety.planted",
    "planted_folder/__init__": "",
}
REPORTED = {
    "settings.planted imports run.planted": "what stands above",
    "data.planted imports run.planted": "in a function",
    "loss.planted imports run.planted": "for a type",
    "engine reaches loss.planted: ": "through a module that it may import",
    "training.planted imports deepspeed, which is for ": "a library of another folder",
    "opsd_cli.training is not allowed to import deepspeed": "a library that no chain of imports may lead to",
    "No cycles are allowed in opsd_cli.safety": "a circle within a folder",
    "planted_folder has no line in the whitelist": "a folder that no line is about",
}


def test_an_import_that_crosses_is_reported_wherever_it_is_written(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(PACKAGE.parent / "pyproject.toml", tmp_path)
    for name, text in PLANTED.items():
        file = tmp_path / PACKAGE.name / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(f"\n{text}\n")
    code, report = lint_imports(tmp_path)
    assert code == 1
    assert {line: kind for line, kind in REPORTED.items() if line not in report} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_torch_free_module_imports_nothing_heavy_at_its_top(path: Path) -> None:
    if any(belongs(name_of(path), free) for free in TORCH_FREE):
        for imported in imports(ast.parse(path.read_text()), everywhere=False):
            assert imported.split(".")[0] not in HEAVY, f"{name_of(path)} imports {imported}"


def loaded_by(*words: str) -> set[str]:
    """The libraries that a command has loaded when it ends."""
    script = (
        "import sys\nfrom opsd_cli.cli import main\ncode = main(sys.argv[1:])\n"
        "print(' '.join({name.split('.')[0] for name in sys.modules}), file=sys.stderr)\nsys.exit(code)"
    )
    environ = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    ended = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=environ)
    assert ended.returncode in (0, 2), ended.stderr
    return set(ended.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("train", "--help"), ("eval", "--help"), ("recipes",)])
def test_help_and_listings_load_nothing_slow(words: tuple[str, ...]) -> None:
    assert not loaded_by(*words) & set(SLOW)


@pytest.mark.parametrize(
    "words", [("train", "recipe=quickstart", "optm.lr=1"), ("recipes", "show", "gsm8k"), ("train", "--resume", "x")]
)
def test_a_command_line_is_checked_without_anything_heavy(words: tuple[str, ...]) -> None:
    assert not loaded_by(*words) & set(HEAVY)
