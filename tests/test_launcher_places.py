"""Where ranks stand: the variables of torchrun, SLURM and MPI, and DeepSpeed's command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opsd_cli import __version__
from opsd_cli.launch.far_ranks import ATTEMPT, FarRanks
from opsd_cli.launch.over_ssh import REMOTE_RANK, DeepSpeedLauncher, read_hostfile
from opsd_cli.launch.rank_environ import Place, rank_environ, usable_cores
from opsd_cli.launch.torchrun_slurm import (
    attempt_id,
    await_first_rank,
    first_host,
    is_attempt_of,
    launch_id,
    place_of,
    refuse_other_device,
    restarts,
)
from opsd_cli.run.folder import RunFolder, write_command
from opsd_cli.run.rank_errors import read_error
from opsd_cli.settings.errors import ConfigError, OutsideError


def test_a_cpu_rank_sees_no_gpu_and_finds_the_tools_of_its_python():
    environ = rank_environ(
        {"PATH": "/bin", "HF_HUB_OFFLINE": "1"}, Place(1, 1, 2, 2, "127.0.0.1", 1), device="cpu", threads=None
    )
    assert environ["CUDA_VISIBLE_DEVICES"] == ""
    assert environ["DS_ACCELERATOR"] == "cpu"
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert environ["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2))
    assert shutil.which("python3", path=environ["PATH"]).startswith(str(Path(sys.executable).parent))


def test_threads_that_were_asked_for_win_over_those_of_the_shell_and_these_over_a_share():
    place = Place(0, 0, 1, 1, "127.0.0.1", 1)
    assert rank_environ({"OMP_NUM_THREADS": "7"}, place, device="cpu", threads=3)["OMP_NUM_THREADS"] == "3"
    assert rank_environ({"OMP_NUM_THREADS": "7"}, place, device="cpu", threads=None)["OMP_NUM_THREADS"] == "7"
    # A list has one number for each level of nested parallel regions.
    assert rank_environ({"OMP_NUM_THREADS": "4,2"}, place, device="cpu", threads=None)["OMP_NUM_THREADS"] == "4"
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS is 'many'; it must be a number of threads"):
        rank_environ({"OMP_NUM_THREADS": "many"}, place, device="cpu", threads=None)


def test_our_package_is_imported_from_any_directory(tmp_path):
    environ = rank_environ(os.environ, Place(0, 0, 1, 1, "127.0.0.1", 1), device="cpu", threads=None)
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the working directory was imported')")
    command = [sys.executable, "-P", "-c", "import random, opsd_cli"]
    subprocess.run(command, env=environ, cwd=tmp_path, check=True)


TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
SLURM |= {"SLURM_JOB_ID": "70123", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_NODEID": "1"}
MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
MPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


def test_the_place_is_read_from_torchrun_slurm_and_mpi():
    assert place_of(TORCHRUN) == Place(3, 1, 4, 2, "node1", 1234)
    assert place_of(SLURM) == Place(5, 1, 8, 4, "gpu003", 15000 + 70123 % 15000)
    assert place_of(SLURM | TORCHRUN) == Place(3, 1, 4, 2, "node1", 1234)
    assert place_of(MPI) == Place(0, 0, 2, 2, "127.0.0.1", 29500)
    assert place_of({"PMI_RANK": "1", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2", "MASTER_ADDR": "a"}).local_world == 1


def test_a_slurm_step_with_unequal_nodes_counts_the_ranks_of_each():
    counts = {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1"}
    assert [place_of(SLURM | counts | {"SLURM_NODEID": node}).local_world for node in "0123"] == [4, 4, 3, 1]


def test_what_mpirun_starts_inside_a_slurm_job_does_not_take_the_place_of_mpiruns_daemon():
    daemon = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    job = {"SLURM_STEP_NODELIST": "gpu004", "SLURM_JOB_NODELIST": "gpu[003-004]"}
    place = place_of(daemon | job | MPI | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert (place.rank, place.world, place.master_addr) == (1, 2, "gpu003")


def test_a_batch_script_without_srun_is_refused_instead_of_waiting_for_ranks_that_nobody_starts():
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}
    with pytest.raises(ConfigError, match=r"batch script of SLURM job 70123.*put srun before"):
        place_of(batch | {"SLURM_JOB_ID": "70123", "SLURM_JOB_NODELIST": "gpu[003-004]"})


def test_steps_beside_each_other_in_one_job_meet_at_different_ports():
    ports = {place_of(SLURM | {"SLURM_STEP_ID": str(step)}).master_port for step in range(8)}
    assert len(ports) == 8
    assert all(15000 <= port < 30000 for port in ports)  # Linux gives 32768 and above to other connections


def test_a_place_that_cannot_be_known_is_refused():
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        place_of(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    with pytest.raises(ConfigError, match="MASTER_PORT is 'x'"):
        place_of(TORCHRUN | {"MASTER_PORT": "x"})
    with pytest.raises(ConfigError, match="torchrun or srun"):
        place_of({"RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-005,7],login", "gpu003"),
        ("a,b", "a"),
        ("n1", "n1"),
        ("x[1,3]y", "x1y"),
        ("n-a-[10-12]", "n-a-10"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("rack[1,2]n[3-4]x,login", "rack1n3x"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_ranks_of_one_launch_share_an_id_and_a_requeue_is_seen():
    other = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}
    assert launch_id(TORCHRUN, place_of(TORCHRUN)) == launch_id(other, place_of(other))
    later = TORCHRUN | {"MASTER_PORT": "1235"}
    assert launch_id(TORCHRUN, place_of(TORCHRUN)) != launch_id(later, place_of(later))
    assert launch_id(SLURM, place_of(SLURM)) == "slurm70123"
    assert not restarts(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0"})
    assert restarts(SLURM | {"SLURM_RESTART_COUNT": "2"})


def test_an_attempt_after_a_requeue_is_not_taken_for_the_one_before_it():
    counts: list[dict[str, str]] = [{}, {"SLURM_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "1"}]
    counts.append({"SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RESTART_COUNT": "1"})
    ids = [attempt_id(SLURM | count, place_of(SLURM)) for count in counts]
    assert len(set(ids)) == len(ids)
    assert all(is_attempt_of(one, "slurm70123") for one in ids)
    assert not is_attempt_of("slurm7012", "slurm70123")
    assert not is_attempt_of(None, "slurm70123")


def test_a_rank_that_waits_in_vain_says_for_what(tmp_path):
    with pytest.raises(OutsideError, match=r"rank 0 made no run folder .*every machine shares"):
        await_first_rank(tmp_path / "a", "id", seconds=0.1)


def test_a_rank_on_another_kind_of_device_than_rank_0_is_refused(tmp_path):
    folder, place = RunFolder(tmp_path), place_of(TORCHRUN)
    refuse_other_device(folder, place, "cpu")  # written by a version that did not say
    write_command(folder, argv=["opsd"], device="cuda")
    refuse_other_device(folder, place, "cuda")
    with pytest.raises(OutsideError, match=r"rank 3 would run on cpu and rank 0 runs on cuda"):
        refuse_other_device(folder, place, "cpu")


def test_a_host_file_is_read_and_its_slips_are_named_by_line(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# mine\nnode1 slots=4\n\nnode2   slots=2 # old\n")
    assert read_hostfile(hostfile) == {"node1": 4, "node2": 2}
    for text, problem in [
        ("node1 slots=4\nnode2 slot=4\n", r"hosts:2: 'node2 slot=4' is not `HOST slots=N`"),
        ("a slots=1\na slots=1\n", r"hosts:2: .* is a duplicate host"),
        ("a slots=0", r"hosts:1"),
        ("\n#\n", "names no host"),
    ]:
        hostfile.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            read_hostfile(hostfile)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "absent")


def launcher_for(runner: str, *, words: str = "--mca x 1", hostfile: str = "/etc/hosts.ds") -> DeepSpeedLauncher:
    return DeepSpeedLauncher(
        hostfile=hostfile,
        runner=runner,
        runner_args=words,
        master_port=29501,
        device="cuda",
        threads=8,
        save_seconds=1.0,
        stall_seconds=None,
        lost_seconds=30.0,
    )


def command_for(runner: str, *, words: str = "--mca x 1", **environ: str) -> tuple[str, ...]:
    hosts = {"node1": 4, "node2": 4}
    return launcher_for(runner, words=words).command(
        Path("/shared/my runs/a"), "train", hosts=hosts, device="cuda", environ=environ
    )


def test_deepspeeds_command_names_the_run_the_meeting_point_and_no_secret():
    command = command_for("slurm", HF_HUB_OFFLINE="1", HF_TOKEN="hf_secret", GLOO_SOCKET_IFNAME="ib0")
    assert command[:3] == (sys.executable, "-m", "deepspeed.launcher.runner")
    script = command.index(str(REMOTE_RANK))
    options, node = command[3:script], command[script + 1 :]
    assert {"--hostfile=/etc/hosts.ds", "--launcher=slurm", "--no_local_rank", "--no_ssh_check"} <= set(options)
    assert {"--launcher_args=--mca x 1", "--master_addr=node1", "--master_port=29501"} <= set(options)
    assert node == (
        "/shared/my runs/a",
        "train",
        "cuda",
        "8",
        "node1",
        "29501",
        "GLOO_SOCKET_IFNAME=ib0",
        "HF_HUB_OFFLINE=1",
    )
    assert "hf_secret" not in " ".join(command)
    assert REMOTE_RANK.is_file()


def test_mpirun_is_told_what_the_user_has_not_told_it():
    (args,) = (word for word in command_for("openmpi") if word.startswith("--launcher_args="))
    assert args.startswith("--launcher_args=--bind-to none --mca plm_rsh_args '-o BatchMode=yes ")
    assert "ServerAliveCountMax=6" in args  # 60 s: after launcher.lost_seconds, whose message says more
    assert "--mca oob_tcp_keepalive_time 40" in args
    assert args.endswith(" --mca x 1")
    assert "--launcher_args=--mca x 1" in command_for("pdsh")
    (args,) = (word for word in command_for("openmpi", words="--map-by numa") if word.startswith("--launcher_args="))
    assert "bind-to" not in args


def test_a_runner_whose_program_is_missing_is_refused(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    for runner, tool in (("pdsh", "pdsh"), ("slurm", "srun"), ("openmpi", "mpirun")):
        with pytest.raises(ConfigError, match=f"launcher.runner={runner} needs {tool}, which is not on PATH here"):
            launcher_for(runner, hostfile=str(tmp_path / "hosts")).prepare({"PATH": str(tmp_path)})
    (tmp_path / "hosts").write_text("a slots=2\n")  # one machine: DeepSpeed starts the ranks itself
    assert launcher_for("pdsh", hostfile=str(tmp_path / "hosts")).prepare({"PATH": str(tmp_path)}).device == "cuda"


def test_the_script_on_another_machine_finds_its_own_package(tmp_path):
    """Of a copy with another version, started by its path from elsewhere, as a runner does."""
    package = tmp_path / "site" / "opsd_cli"
    shutil.copytree(REMOTE_RANK.parents[1], package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "__init__.py").write_text('__version__ = "7.7.7"\n')
    outer = {"PATH": os.environ["PATH"], "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    outer |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    far = FarRanks(RunFolder(tmp_path), ("node1", "node2"), lost_seconds=5.0)
    far.begin()
    words = [str(tmp_path), "train", "cpu", "0", "node1", "29501", f"{ATTEMPT}={far.launch.attempt}"]
    command = [sys.executable, str(package / "launch" / REMOTE_RANK.name), *words]
    done = subprocess.run(command, env=outer, cwd=tmp_path, timeout=20, check=False)
    assert done.returncode == 2
    error = read_error(RunFolder(tmp_path), 1)
    assert error is not None
    assert error.message.startswith(f"has opsd 7.7.7, and the command is of opsd {__version__}")
