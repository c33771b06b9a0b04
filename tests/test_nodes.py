"""Two nodes over ssh, as scripts/nodes.sh plays them: the smallest run, with a rank killed on the far node, and a
refusal. Skipped where this is no root with the tools. The rest of the table is the script's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from nodes.faults import share_root, unshare_root
from nodes.network import Network, network
from nodes.runs import WORDS, over, start, steps_done

TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd", "pdsh")
SHORT = ("train.steps=3", "checkpoint.every=1", "eval.every=3", "eval.before=false", "eval.problems=2")


def why_not() -> str:
    """Why there can be no nodes here; empty if there can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)} (scripts/nodes.sh --install)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "nodes can be made"),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Network]:
    with network(("nodea", "nodeb")) as made:
        yield made
    assert not made.folder.exists()


def nothing_is_left(nodes: Network) -> None:
    for node in nodes.nodes:
        node.wait_for(lambda node=node: not node.leftovers(), "the last process to end", seconds=15.0)


def test_a_rank_killed_on_the_far_node_is_named_and_the_run_goes_on(nodes: Network):
    for node in nodes.nodes:
        node.start_sshd({"OPSD_FAULT": "rank1:kill@step.before_update:3"})
    command = start(nodes, "killed", [*WORDS, *SHORT, *over(nodes, "pdsh", 1)], node=nodes.nodes[0])
    assert command.wait(280) == 3
    assert command.last_line().startswith("rank 1 on nodeb: the process was killed by SIGKILL"), command.lines()
    nothing_is_left(nodes)
    assert steps_done(command.folder) == 2
    for node in nodes.nodes:
        node.start_sshd()
    command = start(nodes, "killed", ["--resume"], node=nodes.nodes[0])
    assert command.wait(280) == 0, command.lines()
    assert (command.folder.model / "model.safetensors").exists()
    nothing_is_left(nodes)


def test_a_folder_that_the_far_node_does_not_see_is_refused_before_a_rank_begins(nodes: Network):
    unshare_root(nodes)
    command = start(nodes, "apart", [*WORDS, *SHORT, *over(nodes, "pdsh", 1)], node=nodes.nodes[0])
    assert command.wait(280) == 2
    assert command.last_line().startswith("rank 1 on nodeb: "), command.lines()
    assert "run.root must be on a file system that every machine shares" in command.last_line()
    share_root(nodes)
    assert not command.folder.path.exists()
