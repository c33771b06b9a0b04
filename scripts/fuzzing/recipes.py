"""Recipe files: real ones with something done to them, YAML of every kind, and bytes; written into the working folder's
own `recipes/` and composed."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import yaml
from hypothesis import strategies as st

from fuzzing.lines import HYDRA, KEYS, ODD_VALUES, SECTIONS, run
from fuzzing.world import in_lines
from opsd_cli.preflight import check
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import GROUPS, builtin_folder, find_folders

HEAD = "# @package _global_\n# mine\ndefaults:\n  - override /model: tiny\n  - override /dataset: arithmetic\n"
SNIPPETS = (
    "_target_: os.system\n", "hydra: {callbacks: {x: {_target_: os.system}}}\n", "  - override /hydra/launcher: x\n",
    "  - ../../x\n", "  - /optim@hydra.job: adamw\n", "  - _self_\n", "  - mine\n", "  - override /recipe: mine\n",
    "run: &a {root: x}\n", "train: *a\n", "<<: {steps: 3}\n", "train: {<<: *a}\n", "a: &a [*a]\n",
    "run: !!python/name:os.system\n", "run: !!binary aGk=\n", "run: !x {}\n", "%YAML 1.2\n---\n",
    "%TAG ! tag:x:\n---\n", "---\n", "...\n", "--- \n- 1\n", "? [a, b]\n: c\n", "? {a: b}\n: c\n", "1: 2\n",
    "null: 1\n", "true: x\n", "2001-01-01: x\n", "train: 2001-01-01\n", "train: {steps: 2001-01-01 01:02:03}\n",
    "train: {steps: 0o17}\n", "train: {steps: 1_0}\n", "train: {steps: 190:20:30}\n", "train: {steps: 1e400}\n",
    "train: {steps: .inf}\n", "train: {steps: .nan}\n", f"train: {{steps: {'9' * 5000}}}\n",
    "train: {steps: ${train.steps}}\n", "train: {steps: ${run.seed}}\n",
    "run: {seed: ${train.steps}}\ntrain: {steps: ${run.seed}}\n", "train: ${run}\n", "run: ${train}\n",
    "train: ???\n", "train: null\n", "train: []\n", "train: x\n", "lora: {targets: [${run.root}]}\n",
    "run: {root: ${oc.env:HOME}}\n", "run: {root: ${oc.decode:x}}\n", "run: {root: '${a'}\n", "run: {root: '${}'}\n",
    "run: {root: '$${x}'}\n", "run: {root: '\\${x}'}\n", "run: {name: ../x}\n", "run: {root: \"\\e[31m\\0\\x80\"}\n",
    "model: {trust_remote_code: true}\n", "model: {chat_template: /etc/passwd}\n", "\tx: 1\n", "x: 'a\n",
    "x: \"\\ud800\"\n", "\ufeff", "\x85run: {root: x}\n", "# c\u2028hydra: {x: 1}\n", "# c\x85hydra: {x: 1}\n",
    "a: b # c\rhydra: {x: 1}\n", "# @package hydra\n", "#@package hydra.run\n", "# @  package  foo\n", "# @hydra\n",
    "x: |\n  # @package hydra\n", "[]: 1\n", "- 1\n", "1\n",
)  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(ODD_VALUES),
    st.dates(),
    st.binary(max_size=4),
)
trees = st.recursive(
    scalars,
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(
            st.sampled_from((*SECTIONS, *KEYS, *HYDRA, *GROUPS, "defaults", "_target_", "()", "name")) | scalars,
            below,
            max_size=3,
        )
    ),
    max_leaves=12,
)


def bomb(depth: int) -> str:
    """A recipe that is short and would be endless if its aliases were followed."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


def deep(pair: tuple[str, int]) -> str:
    """Brackets in brackets, closed or not."""
    opening, depth = pair
    closing = {"[": "]", "{a: ": "}", "- ": "", "? ": ""}[opening]
    return "train: " + opening * depth + "1" + closing * depth + "\n"


@st.composite
def edited(draw: st.DrawFn) -> str:
    """A recipe of opsd's own, with lines taken out, doubled, moved and put in."""
    lines = draw(st.sampled_from(OWN)).splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines)))
        match draw(st.integers(0, 3)):
            case 0:
                lines[place : place + 1] = []
            case 1:
                lines.insert(place, draw(st.sampled_from(SNIPPETS)))
            case 2:
                lines.insert(
                    place,
                    "  " * draw(st.integers(0, 3))
                    + draw(st.sampled_from(KEYS))
                    + ": "
                    + draw(st.sampled_from(ODD_VALUES))
                    + "\n",
                )
            case 3 if place < len(lines):
                cut = draw(st.integers(0, len(lines[place])))
                lines[place] = lines[place][:cut] + draw(st.text(max_size=3)) + lines[place][cut:]
    return "".join(lines)


OWN = [
    path.read_text("utf-8")
    for group in ("recipe", "method", "dataset", "optim")
    for path in sorted((builtin_folder() / group).glob("*.yaml"))
]

files = st.one_of(
    edited().map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=3).map(
        lambda s: (HEAD + "".join(s)).encode("utf-8", "surrogatepass")
    ),
    trees.map(
        lambda t: (HEAD + yaml.dump({"train": t} if not isinstance(t, dict) else t, allow_unicode=True)).encode(
            "utf-8", "surrogatepass"
        )
    ),
    trees.map(lambda t: yaml.dump(t).encode()),
    st.integers(1, 40).map(lambda n: (HEAD + bomb(n)).encode()),
    st.tuples(st.sampled_from(("[", "{a: ", "- ", "? ")), st.integers(1, 3000)).map(
        lambda p: (HEAD + deep(p)).encode()
    ),
    st.tuples(st.sampled_from(SNIPPETS), st.sampled_from(("utf-16", "utf-32", "utf-8-sig", "utf-7"))).map(
        lambda p: (HEAD + p[0]).encode(p[1], "replace")
    ),
    st.binary(max_size=40).map(lambda b: HEAD.encode() + b),
    st.binary(max_size=60),
    st.tuples(st.sampled_from(SNIPPETS), st.integers(1, 2000)).map(
        lambda p: (HEAD + p[0] * p[1]).encode("utf-8", "surrogatepass")[: 1 << 16]
    ),
)
recipes = st.tuples(st.sampled_from(("recipe", "recipe", "recipe", "method", "dataset", "optim")), files)


def check_recipe(case: tuple[str, bytes]) -> None:
    """A recipe file composes, or is refused with lines that name it; it never makes the program do anything else."""
    group, content = case
    folder = Path("recipes")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / group).mkdir(parents=True)
    (folder / group / "mine.yaml").write_bytes(content)
    words = ["recipe=mine"] if group == "recipe" else ["recipe=quickstart", f"{group}=mine"]
    with contextlib.suppress(ConfigError):
        in_lines(lambda: check(words, find_folders()))
    run(["recipes"])
    run(["recipes", "show", f"{group}/mine"])
