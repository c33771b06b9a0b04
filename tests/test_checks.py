"""The rules between settings: asked of every command line and every run folder, whatever a method is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher_support import Screen, config_in, on_cpu, resume
from recipe_support import config_of, only_problem_of, problems_of, write_recipe

from opsd_cli.checks import check_config, check_ranks
from opsd_cli.run.folder import RunFolder, write_config
from opsd_cli.settings import registry
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import plugin
from opsd_cli.settings.typed_config import plain_tree

QUICK = "recipe=quickstart"


@pytest.fixture
def own_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A divergence as a researcher adds one: no base class, one recipe file."""
    kinds = {kind: dict(options) for kind, options in registry._REGISTRIES.items()}
    monkeypatch.setattr(registry, "_REGISTRIES", kinds)
    monkeypatch.chdir(tmp_path)

    @plugin("divergence", "own")
    class Own:
        needs_teacher = True

        def value_and_gradient(self, tokens):
            return tokens.forward_kl_n, tokens.student_probs_nV - tokens.teacher_probs_nV

    write_recipe(tmp_path / "recipes", "divergence/own", "# A divergence of one's own\nname: own\n")
    return "divergence=own"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("train.updates_per_step=4",), "train.updates_per_step is 4, so the later updates are off-policy"),
        (("target.kind=guided",), "target.kind=guided and target.other=none do not go together"),
        (("context=sibling",), "set train.rollouts_per_problem to 2 or more (got 1)"),
        (("teacher=none",), "divergence=own needs a teacher"),
        (("clip=neutral",), "clip.kind=neutral is defined for divergence=forward_kl only"),
        (("clip=entry",), "clip.kind=entry needs a divergence that is a sum over the vocabulary"),
        (("support=student_top256",), "support.rest=drop needs a divergence that is a sum over the vocabulary"),
    ],
)
@pytest.mark.slow
def test_a_divergence_without_a_base_class_is_checked_like_any_other(
    own_divergence: str, words: tuple[str, ...], reason: str
):
    assert config_of(QUICK, own_divergence).divergence.plugin_name == "own"
    assert reason in only_problem_of(QUICK, own_divergence, "train.rollouts_per_problem=1", *words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("context=solution",), "context=solution shows the teacher {{solution}}"),
        (("context=answer_only", "sampler=dataset"), "sampler=dataset takes the reference solution as completion"),
        (("context=answer_only", "sampler=static_mix"), "sampler=static takes the reference solution as completion"),
    ],
)
def test_what_needs_a_solution_is_refused_where_the_data_have_none(words: tuple[str, ...], reason: str):
    data = ("recipe=jsonl", "dataset.path=rows.jsonl", "dataset.solution_field=null")
    assert any(reason in problem for problem in problems_of(*data, *words))


@pytest.mark.parametrize("sampler", ["static", "vllm"])
def test_no_sampler_completes_a_prompt_that_is_made_of_its_completions(sampler: str):
    words = ("method=sdpo", "train.rollouts_per_problem=4", f"sampler={sampler}", "sampler.prompt=teacher")
    assert any("use sampler.prompt=student" in problem for problem in problems_of(QUICK, *words))


@pytest.mark.slow
def test_halving_is_refused_where_a_rank_that_fails_leaves_the_others_in_a_collective():
    words = (QUICK, "train.halve_on_oom=true")
    check_ranks(config_of(*words, "zero=stage3", "launcher.ranks=1"), 1)
    check_ranks(config_of(*words, "zero=stage2"), 2)
    with pytest.raises(ConfigError, match=r"zero.stage=3 on 2 ranks.*use zero=stage2"):
        check_ranks(config_of(*words, "zero=stage3"), 2)
    assert "zero.stage=3 on 2 ranks" in only_problem_of(*words, "zero=stage3", "launcher.ranks=2"), "as soon as known"


def test_a_run_folder_whose_config_was_edited_is_checked_when_it_is_resumed(tmp_path: Path):
    config = on_cpu(config_in(tmp_path))
    tree = plain_tree(config)
    tree["train"]["updates_per_step"] = 4
    folder = RunFolder(tmp_path / "run")
    folder.logs.mkdir(parents=True)
    write_config(folder, tree)
    with pytest.raises(ConfigError, match=r"train.updates_per_step is 4"):
        resume(folder.path, Screen())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("zero.hpz_ranks=2",), "zero.stage=3 and zero.offload_parameters=none (got 2 and none)"),
        (("zero=stage3_offload", "zero.hpz_ranks=2"), "(got 3 and cpu)"),
        (("zero=stage3_hpz", "launcher.ranks=4"), "it is 8 and there are 4"),
        (
            ("zero=stage3_hpz", "teacher=external", "teacher.path=bundled:tiny_teacher", "teacher.placement=sharded"),
            "which DeepSpeed cannot; use teacher.placement=replicated",
        ),
    ],
)
def test_a_second_set_of_parameters_in_each_node_needs_whole_nodes(words: tuple[str, ...], reason: str):
    assert reason in only_problem_of(QUICK, *words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("zero=stage0", "zero.overlap=true"), "zero.stage=1 to 3 (got 0)"),
        (
            ("zero.gather=model",),
            "zero.gather=model says how sharded weights are gathered, which needs zero.stage=3 (got 2)",
        ),
        (("zero.persist_below=9",), "which needs zero.stage=3 and zero.hpz_ranks=1 (got 2 and 1)"),
        (("zero=stage3", "zero.persist_below=9", "teacher=ema"), "teacher=ema is a copy of the shards"),
        (("zero=stage3", "zero.persist_below=9", "teacher=initial", "lora=none"), "teacher=initial is a copy"),
    ],
)
def test_what_beside_the_shards_is_kept_or_done_goes_with_them(words: tuple[str, ...], reason: str):
    assert reason in only_problem_of(QUICK, *words)


def test_small_parameters_may_stay_whole_where_no_teacher_is_a_copy():
    for teacher in (("teacher=live",), ("teacher=initial", "lora=r16")):
        check_config(config_of(QUICK, "zero=stage3", "zero.persist_below=9", *teacher))


def test_as_many_ranks_as_whole_nodes_have_are_taken():
    check_ranks(config_of(QUICK, "zero=stage3_hpz", "launcher.ranks=16"), 16)
    with pytest.raises(ConfigError, match="there are 12"):
        check_ranks(config_of(QUICK, "zero=stage3_hpz"), 12)
