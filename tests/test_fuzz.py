"""A sample of what `scripts/fuzz.py` runs by the thousand, and the fuzzer's own fence."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from fuzz import FAMILIES, fuzz
from fuzzing import texts
from fuzzing.world import Hang, OutOfBounds, one_case

from opsd_cli.settings.errors import DataError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.sample])
def test_hostile_input_is_answered(name: str) -> None:
    family = FAMILIES[name]
    assert len(fuzz(family, cases=family.sample, seed=0)) >= family.sample / 2  # less where cases repeat themselves


def test_a_chat_template_is_rendered_where_a_sample_would_seldom_come(tmp_path: Path) -> None:
    """Templates have no sample: each starts a process. One that is fine goes all the way."""
    with one_case(tmp_path):
        texts.check_template("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<a>")


def test_the_fuzzer_would_notice(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with one_case(scratch):
        (scratch / "inside").write_text("fine")
        raise DataError("an answer")
    (scratch / "link").symlink_to(tmp_path)
    for touch in (outside.touch, outside.mkdir, (scratch / "link" / "outside").touch):
        with pytest.raises(OutOfBounds), one_case(scratch):
            touch()
    with pytest.raises(OutOfBounds), one_case(scratch):
        os.system("true")
    with pytest.raises(OutOfBounds), one_case(scratch):
        subprocess.run(["true"], check=False)
    with pytest.raises(Hang), one_case(scratch, seconds=0.05):
        time.sleep(5)
    with pytest.raises(KeyError), one_case(scratch):
        raise KeyError
    assert not outside.exists()
    outside.touch()  # the fence is down again
