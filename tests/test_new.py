"""`opsd new` writes parts that work as they are."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from recipe_support import config_of, opsd

from opsd_cli.commands.new import DESCRIPTIONS, command, skeleton
from opsd_cli.settings.plugin_files import use_plugins
from opsd_cli.settings.recipe_files import GROUPS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    use_plugins([])


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_a_new_part_composes_and_its_own_test_passes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(capsys, "new", kind, "my_part")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].strip() == command(kind, "my_part")
    assert kind in GROUPS
    written = [Path(line) for line in out.splitlines() if Path(line).is_file()]
    assert written == list(skeleton(kind, "my_part"))
    assert not any(word in path.read_text() for path in written for word in ("NAME", "CLASS", "DESCRIPTION"))
    words = command(kind, "my_part").split()[2:]
    use_plugins([file for flag, file in pairwise(words) if flag == "--plugin"])
    config = config_of(*(word for word in words if "=" in word))
    assert vars(config)[kind].name == "my_part" if kind == "context" else vars(config)[kind].plugin_name == "my_part"
    tests = runpy.run_path("test_my_part.py")
    passed = [test() for name, test in tests.items() if name.startswith("test_")]
    assert passed


def test_nothing_is_overwritten_and_other_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes/divergence").mkdir(parents=True)
    Path("recipes/divergence/mine.yaml").write_text("# mine\n")
    for words, told in (
        (("divergence", "mine"), "exists"),
        (("divergenc", "mine"), "did you mean 'divergence'"),
        (("context", "My-Part"), "small letters"),
        (("divergence", "forward_kl"), "which yours would hide"),
        (("context",), "opsd new KIND NAME"),
    ):
        code, out, err = opsd(capsys, "new", *words)
        assert (code, out, told in err) == (2, "", True)
    assert sorted(path.name for path in Path().iterdir()) == ["recipes"]
