"""Who may import whom, read from the source, and what a command may load before it starts ranks."""

from __future__ import annotations

import ast
import os
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

OWNERS = {"hydra": "settings.compose", "omegaconf": "settings.compose", "deepspeed": "engine", "rich": "ui"}
"""A library and the one module or package that may import it, anywhere in the file."""

MAY_NOT_IMPORT = {
    "settings": (
        "commands",
        "ui",
        "launch",
        "training",
        "rank",
        "run",
        "data",
        "loss",
        "teachers",
        "sampling",
        "engine",
    ),
    "safety": ("settings", "run", "launch", "data", "rank", "training", "loss", "teachers", "sampling", "engine"),
    "data": ("commands", "ui", "launch", "training", "rank", "loss", "teachers", "sampling"),
    "loss": ("commands", "ui", "launch", "rank", "training", "engine", "sampling", "teachers"),
    "teachers": ("commands", "ui", "launch", "rank", "training", "engine", "sampling"),
    "engine": ("commands", "ui", "launch", "rank"),
    "training": ("commands", "ui", "launch", "rank"),
    "checks": ("commands", "ui", "launch", "rank", "training", "engine"),
    "ui": ("commands", "launch", "training", "rank", "data", "loss", "sampling", "engine"),
    "run": ("commands", "ui", "launch", "training", "rank", "data", "loss", "sampling", "engine"),
    "launch": ("commands", "ui", "training", "rank", "data", "loss", "sampling", "engine"),
    "commands": ("rank", "training", "engine", "loss", "sampling", "teachers", "data"),
}
"""A module or package and those above or beside it that it must not know."""


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


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_library_is_imported_by_its_owner_only(path: Path) -> None:
    name = name_of(path)
    for imported in imports(ast.parse(path.read_text()), everywhere=True):
        owner = OWNERS.get(imported.split(".")[0])
        assert owner is None or belongs(name, owner), f"{name} imports {imported}, which is for {owner}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_does_not_import_what_stands_above_it(path: Path) -> None:
    name = name_of(path)
    refused = [other for owner, others in MAY_NOT_IMPORT.items() if belongs(name, owner) for other in others]
    for imported in imports(ast.parse(path.read_text()), everywhere=False):
        if imported.startswith("opsd_cli."):
            inner = imported.removeprefix("opsd_cli.")
            assert not any(belongs(inner, other) for other in refused), f"{name} imports {imported}"


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
