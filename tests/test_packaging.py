"""The wheel: what is in it, and that it works outside the checkout. Built once; installed without dependencies, since
the environment of the tests has them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from support import REPOSITORY

from opsd_cli import __version__

pytestmark = pytest.mark.slow

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
IGNORED = ("__pycache__",)


def files_below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not set(IGNORED) & set(path.parts))
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Build isolation would fetch the build backend anew; where it is installed that is not needed.
    offline = ["--no-build-isolation"] if _is_installed("hatchling") else []
    subprocess.run([*PIP, "wheel", str(REPOSITORY), "--no-deps", *offline, "-w", str(folder)], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "site-packages"
    subprocess.run([*PIP, "install", str(wheel), "--no-deps", "--no-compile", "--target", str(target)], check=True)
    return target


def _is_installed(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def opsd(installed: Path, *words: str, cwd: Path) -> str:
    """The installed command, in a folder where no checkout can be found."""
    environ = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(
        [sys.executable, str(installed / "bin" / "opsd"), *words],
        cwd=cwd, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_wheel_holds_code_recipes_and_the_bundled_model_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {f"opsd_cli/{name}" for name in files_below(REPOSITORY / "opsd_cli")}
    recipes = {f"opsd_cli/_recipes/{name}" for name in files_below(REPOSITORY / "recipes")}
    assert names == code | recipes
    assert {"opsd_cli/py.typed", "opsd_cli/assets/tiny/model.safetensors", "opsd_cli/_recipes/config.yaml"} <= names
    assert wheel.stat().st_size < 5 * 2**20


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    assert wheel.name.startswith(f"opsd_cli-{__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert "License-Expression: Apache-2.0" in text
    assert "# opsd" in text


def test_the_installed_command_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert opsd(installed, "--version", cwd=tmp_path) == f"opsd {__version__}\n"
    listed = opsd(installed, "recipes", cwd=tmp_path)
    assert "recipe=  what to train" in listed
    assert "  quickstart " in listed
    script = "import opsd_cli, opsd_cli.settings.recipe_files as f; print(opsd_cli.__file__); print(f.builtin_folder())"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(line.startswith(str(installed)) for line in ended.stdout.splitlines())


def test_the_installed_recipes_compose(installed: Path, tmp_path: Path) -> None:
    shown = opsd(installed, "recipes", "show", "quickstart", cwd=tmp_path)
    assert "path: bundled:tiny" in shown
    assert "split: test" in shown


def pinned_versions() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pins}


UNPINNED = {"triton"}  # torch for CUDA requires one version of it, which differs from build to build


def test_every_dependency_has_a_lower_bound_and_a_tested_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name, bound, _ = requirement.partition(">=")
        assert bound, requirement
        assert name.lower() in pinned_versions().keys() | UNPINNED, requirement


def test_torch_is_constrained_to_a_version_that_every_index_has() -> None:
    assert "+" not in pinned_versions()["torch"]


def test_the_hooks_run_the_linter_that_the_tests_run() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (revision,) = (repo["rev"] for repo in hooks["repos"] if repo["repo"].endswith("/ruff-pre-commit"))
    assert revision == f"v{pinned_versions()['ruff']}"
