"""Command lines: overrides with every oddity of Hydra's grammar, checked as `opsd train` checks them, and whole
commands through `cli.main` that start no rank."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

from hypothesis import strategies as st

from fuzzing.world import in_lines
from opsd_cli.cli import COMMANDS, main
from opsd_cli.preflight import check
from opsd_cli.settings.recipe_files import GROUPS, find_folders

ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SECTIONS = ("run", "train", "sampling", "prompts", "loss", "eval", "checkpoint", "model", "dataset", "optim", "lora")
KEYS = (
    "steps", "seed", "name", "root", "lr", "path", "problems", "system", "targets", "temperature", "revision", "rank",
    "keep_last", "trust_remote_code", "max_completion_tokens", "chat_template", "max_tokens",
)  # fmt: skip
HYDRA = (
    "hydra", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode", "hydra.launcher",
    "hydra.sweeper", "hydra.sweeper.params", "hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler",
    "hydra.searchpath", "hydra.callbacks.x._target_", "hydra.job.env_set", "hydra.output_subdir",
    "hydra.job_logging.handlers",
)  # fmt: skip
ODD_VALUES = (
    "", "''", '""', "'", '"', "null", "???", "true", "nan", "inf", "-inf", "1e400", "9" * 400, "0x1f", "1_000", "-0",
    "[", "]", "{", "}", "[[[[", "{a:{b:{c:1}}}", "{a:1,a:2}", "[1,[2,[3]]]", "(1)", "1,2", ",", "1,,2", "a,'b,c'",
    "range(1,4)", "range(1,1000000)", "range(3)", "range(1,2,0)", "choice(1,2)", "choice()", "choice(choice(1))",
    "glob(*)", "glob([a*,t*],exclude=x)", "interval(0,1)", "shuffle(1,2,3)", "sort(3,1,2)", "sort(range(1,5))",
    "tag(a,choice(1,2))", "int(3.5)", "int(x)", "float(1)", "str([1])", "json_str('{}')", "bool(2)", "extend_list(1)",
    "${", "${}", "${train.steps}", "${train}", "${run.name}", "${nope}", "${.x}", "${..}", "${oc.env:HOME}",
    "${oc.decode:'1'}", "${${run.name}}", "${train.steps}${run.root}", "\\", "\\'", "$(id)", "`id`", "a b", " a",
    "a ", "../../x", "/etc/passwd", "~/x", "~", ".", "..", "NaN.yaml", "\ud800", "é", "\u202eabc", "\x1b[31m", "\n",
    "\t", "a\r\nb",
)  # fmt: skip
FLAGS = (
    "--resume", "--recipes", "--config-dir", "--cfg", "--info", "--package", "--resolve", "-m", "--multirun",
    "--help", "--dry-run", "--hydra-help", "--config-path", "--experimental-rerun", "-cd", "-c", "-p", "--", "-",
    "--x", "-1",
)  # fmt: skip

text = st.text(st.characters(exclude_characters="\0"), max_size=12)
name = st.sampled_from((*GROUPS, *SECTIONS, *KEYS, "quickstart", "tiny", "opsd", "arithmetic", "recipes")) | text


@st.composite
def keys(draw: st.DrawFn) -> str:
    """A key: real, nearly real, Hydra's own, or anything."""
    kind = draw(st.integers(0, 6))
    if kind <= 2:
        key = f"{draw(st.sampled_from(SECTIONS))}.{draw(st.sampled_from(KEYS))}"
    elif kind == 3:
        key = draw(st.sampled_from(HYDRA))
    elif kind == 4:
        key = draw(st.sampled_from(tuple(GROUPS)))
    else:
        key = draw(text)
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(key)))
        key = (
            key[:place]
            + draw(st.sampled_from(("_target_", ".", "..", "/", "@", "x", "", ":", "()", "_args_")))
            + key[place:]
        )
    return key


values = st.one_of(
    st.sampled_from(ODD_VALUES),
    st.integers().map(str),
    st.floats().map(str),
    name,
    st.lists(st.sampled_from((*ODD_VALUES, *"[]{}(),:'\"$\\ ~+=@")), max_size=5).map("".join),
)
overrides = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(("", "", "", "", "+", "++", "~", "~~", " ")),
    keys(),
    st.sampled_from(("", "", "", "", "", "@x", "@a:b", "@_global_", "@")),
    st.sampled_from(("=", "=", "=", "=", "==", "", " = ", "= ")),
    values,
)
words = st.lists(overrides | overrides | overrides | text, max_size=4)
lines = st.tuples(st.booleans().map(lambda whole: ["recipe=quickstart"] if whole else []), words, st.booleans())


def check_line(case: tuple[list[str], list[str], bool]) -> None:
    """A line's words are one or more runs, or problems of one line each."""
    start, rest, multirun = case
    in_lines(lambda: check([*start, *rest], find_folders(), multirun=multirun))


commands = st.one_of(
    words.map(lambda w: ["train", "recipe=quickstart", *w, "optm.lr=1"]),
    st.tuples(st.sampled_from(("job", "all", "hydra", "x")), words, st.lists(name, max_size=1)).map(
        lambda c: ["train", "--cfg", c[0], "recipe=quickstart", *c[1], *(["--package", *c[2]] if c[2] else [])]
    ),
    st.tuples(st.sampled_from(("defaults", "defaults-tree", "config")), words).map(
        lambda c: ["train", "--info", *c[1], c[0]]
    ),
    st.tuples(st.sampled_from(("show", "list", "shw")), name).map(lambda c: ["recipes", *c]),
    st.tuples(name, name).map(lambda c: ["recipes", "show", f"{c[0]}/{c[1]}"]),
    st.tuples(name | st.sampled_from(ODD_VALUES[:-1]), words).map(lambda c: ["eval", c[0], *c[1], "eval.problems=0"]),
    st.tuples(st.sampled_from(("watch", "eval")), name | st.sampled_from(ODD_VALUES)).map(list),
    st.tuples(name, words).map(lambda c: ["train", "--resume", f"no-such-{c[0]}", *c[1]]),
    st.tuples(st.sampled_from(tuple(COMMANDS)), st.lists(st.sampled_from(FLAGS) | name, max_size=4)).map(
        lambda c: [c[0], *c[1], "optm.lr=1"]
    ),
    st.lists(text, max_size=3),
)


def check_command(argv: list[str]) -> None:
    """A whole command ends with a code that means something, and says what is wrong in plain lines."""
    code, _, said = run(argv)
    assert code in (0, 2, 3, 4), (code, said)


def run(argv: list[str]) -> tuple[int, str, str]:
    """`cli.main` in this process: exit code, stdout, stderr, the latter looked at."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    said: Any = err.getvalue()
    assert "Traceback" not in said, said
    assert not ACTIVE.search(said), said
    assert not ACTIVE.search(out.getvalue()), out.getvalue()
    return code, out.getvalue(), said
