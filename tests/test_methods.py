"""The space of methods: every published point and every pair of divergence and teacher takes a real step, and what
makes no sense is refused with the reason."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from functools import cache

import pytest
import yaml
from recipe_support import config_of, problems_of, section, sections_of_method
from support import REPOSITORY, TESTS, run_ranks

from opsd_cli.preflight import config_of as config_of_tree
from opsd_cli.rank.drift_monitor import why_no_signal
from opsd_cli.run.events import METRICS
from opsd_cli.settings.compose import parse_override, resolve, session
from opsd_cli.settings.recipe_files import GROUPS, find_folders
from opsd_cli.settings.registry import plugin_names
from opsd_cli.settings.trees import set_value
from opsd_cli.settings.typed_config import plain_tree

METHODS = list(find_folders().files["method"])
SEVERAL = ("sdpo", "sdpo_feedback", "sc_sdpo", "sr_opsd", "paced")  # look at several rollouts of a problem
NEEDS = dict.fromkeys(SEVERAL, ("train.rollouts_per_problem=4",))
NEEDS_RIGHT = ("sdpo", "sc_sdpo", "paced", "opsd_correct", "dce")  # no loss where no rollout is right
SMALL = (
    "recipe=quickstart", "train.problems_per_step=3", "sampling.max_completion_tokens=24", "eval.problems=0",
    "dataset.train_problems=30", "dataset.validation_problems=0", "dataset.test_problems=0",
    "dataset.retention_problems=0", "launcher.ranks=1",
    "loss.mask_truncated=false",
)  # fmt: skip
TEACHERS = [name for name in plugin_names("teacher") if name != "none"]
DIVERGENCES = [name for name in plugin_names("divergence") if name != "cross_entropy"]


@cache
def base() -> dict:
    return plain_tree(config_of(*SMALL))


def tree_of(*words: str) -> dict:
    """The tree of a command line, put together from the files of its options: a composition takes a third of a second,
    and test_recipes holds what Hydra makes of every method against these sections."""
    tree = deepcopy(base())
    for word in words:
        key, _, value = word.partition("=")
        if key == "method":
            tree |= sections_of_method(value)
        elif key in GROUPS:
            tree[key] = deepcopy(section(key, value))
        else:
            set_value(tree, key, yaml.safe_load(value))
    plain, broken = resolve(tree)
    assert not broken
    return plain_tree(config_of_tree(plain))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    plan = {method: [tree_of(f"method={method}", *NEEDS.get(method, ()))] for method in METHODS}
    pairs = [(divergence, teacher) for teacher in TEACHERS for divergence in DIVERGENCES]
    short = ("train.problems_per_step=1", "sampling.max_completion_tokens=8")
    plan["pairs"] = [tree_of(f"divergence={divergence}", f"teacher={teacher}", *short) for divergence, teacher in pairs]
    plan["rules"] = [
        tree_of(*words)
        for words in (
            ("support=union_top100", "divergence=jsd"),
            ("support=student_top256", "divergence=reverse_kl"),
            ("clip=neutral",), ("clip=entry",), ("clip=token", "support=teacher_top100"),
            ("tokens=uncertain",), ("tokens=supported",), ("tokens=skip3",), ("tokens=wrong_only",),
            ("target=barycentre", "teacher=blend"),
            ("loss.reduction=problem", "divergence=routed", "support=teacher_top100", "clip=token"),
            ("target=average_views",),
            ("loss.reduction=sequence", "tokens=wrong_prefix", "target=contrast_wrong", "target.temperature=0.8"),
            ("train.updates_per_step=2", "loss.importance_cap=2.0"),
            ("sampler=static_mix", "loss.importance_cap=2.0"), ("sampler=teacher_prompt",),
        )
    ]  # fmt: skip
    sdpo = ("method=sdpo", "train.rollouts_per_problem=2")
    plan["cut"] = [tree_of(*sdpo, "sampling.max_completion_tokens=2")]
    room = ("sampling.max_completion_tokens=90", "prompts.max_tokens=60", "prompts.max_dropped_share=0.5")
    plan["long"] = [tree_of(*sdpo, "sampler=dataset", *room)]
    plan["told"] = [tree_of(*sdpo, "context=feedback", "sampling.max_completion_tokens=2")]
    file = tmp_path_factory.mktemp("methods") / "plan.json"
    file.write_text(json.dumps(plan))
    run_ranks([TESTS / "method_steps_ranks.py", file], 1)
    return json.loads(file.with_suffix(".found").read_text())


def test_the_page_names_every_method_at_once():
    page = (REPOSITORY / "docs" / "methods.md").read_text("utf-8")
    (word,) = set(re.findall(r"'(method=glob.*?)'", page))
    with session(find_folders()):
        override = parse_override(word)
    assert sorted(override.values) == sorted(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_published_method_takes_a_step(found, method: str):
    metrics = found[f"{method} 0"]
    assert metrics.keys() <= METRICS.keys()
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["tokens/completion"] > 0
    if method == "no_reference":  # the teacher is the student, and sees no more than it
        assert metrics["optim/grad_norm"] == pytest.approx(0, abs=1e-4)
    elif method not in NEEDS_RIGHT:
        assert metrics["optim/grad_norm"] > 0


@pytest.mark.slow
def test_a_context_made_of_rollouts_says_for_how_many_it_could_not_be_made(found):
    """Cut after two tokens; references, which are right, but too long for a prompt; a verifier's words instead."""
    cut, long, told = (found[f"{name} 0"] for name in ("cut", "long", "told"))
    assert (cut["rollout/without_context"], cut["optim/grad_norm"]) == (1.0, 0.0)
    assert "raise sampling.max_completion_tokens" in why_no_signal(cut)
    assert long["rollout/without_context"] == long["rollout/context_too_long"] == 1.0
    assert "longer than prompts.max_tokens" in why_no_signal(long)
    assert told["rollout/without_context"] == 0.0
    assert told["optim/grad_norm"] > 0
    assert "rollout/without_context" not in found["opsd 0"], "a written context is always there"


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.slow
def test_every_divergence_goes_with_every_teacher(found, divergence: str, teacher: str):
    number = TEACHERS.index(teacher) * len(DIVERGENCES) + DIVERGENCES.index(divergence)
    metrics = found[f"pairs {number}"]
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["kl/forward"] > 0


@pytest.mark.slow
def test_supports_clips_rules_targets_and_sampling_policies_take_steps(found):
    rows = {name: metrics for name, metrics in found.items() if name.startswith("rules")}
    assert len(rows) == 16
    for metrics in rows.values():
        assert all(math.isfinite(value) for value in metrics.values())
    assert any("tokens/passed_gate" in metrics for metrics in rows.values())
    assert 0 < found["rules 12"]["tokens/in_prefix"] <= 1
    assert found["rules 13"]["tokens/importance"] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("divergence=cross_entropy",), "uses no teacher"),
        (("teacher=none",), "needs a teacher"),
        (("method=opd", "model=hf", "model.path=some/model"), "teacher=external needs a model: teacher.path=PATH"),
        (("divergence=sampled_token", "support=teacher_top100"), "support=full"),
        (("divergence=sampled_token", "clip=entry"), "clip=none"),
        (("divergence=reverse_kl", "clip=neutral"), "clip=token"),
        (("divergence=forward_kl", "clip=token", "support=student_top256"), "support.rest=drop"),
        (("target=teacher", "target.other=free"), "target.other=free"),
        (("target=barycentre", "target.weight=1.5"), "from 0 to 1"),
        (("target=barycentre", "target.weight=-0.5"), "from 0 to 1"),
        (("target=minus_free", "target.weight=-1.5"), "target.weight"),
        (("target=average_views", "target.weight=1.0"), "between 0 and 1"),
        (("target=average_views", "target.temperature=2.0"), "takes each pass as it is"),
        (("target=average_views", "teacher=blend"), "takes each pass as it is"),
        (("target=two_views", "target.other=free"), "give both or neither"),
        (("target=two_views", "target.view='{{question}} {{siblings}}'"), "target.view: unknown placeholder"),
        (("target=two_views", "target.view='{{question}} {{sibling}}'"), "which context.teacher must show too"),
        (("method=sft", "target.temperature=2.0"), "target.temperature is the teacher's"),
        (("teacher=blend", "teacher.live=1.0"), "use teacher=live"),
        (("divergence=routed", "divergence.below=forward_kl"), "use that divergence itself"),
        (("divergence=routed", "clip=neutral"), "clip.kind=neutral"),
        (("divergence=renyi", "clip=entry"), "clip.kind=entry needs"),
        (("divergence=renyi", "divergence.order=0.0"), "divergence.order"),
        (("tokens.gate_low=0.5",), "belong to a gate"),
        (("tokens=supported", "tokens.gate_low=1.0"), "would change nothing"),
        (("tokens=skip3", "tokens.first=3"), "leaves nothing of tokens.first"),
        (("tokens.prefix_of=wrong",), "needs a prefix"),
        (("tokens=pass_spread",), "train.rollouts_per_problem"),
        (("method=sft", "tokens=wrong_prefix"), "it needs a teacher"),
        (("method=sft", "tokens=supported"), "needs a teacher"),
        (("method=sft", "target=barycentre"), "needs a teacher"),
        (("train.updates_per_step=2",), "loss.importance_cap"),
        (("loss.importance_cap=2.0", "sampling.temperature=0.7"), "one temperature"),
        (("method=sdpo",), "train.rollouts_per_problem"),
        (("divergence=jsd", "divergence.beta=0.0"), "divergence.beta"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(words: tuple[str, ...], reason: str):
    problems = problems_of("recipe=quickstart", *words)
    assert any(reason in problem for problem in problems), problems
