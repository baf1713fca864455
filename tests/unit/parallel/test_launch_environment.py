"""The rank of a process from its environment: launchers, Slurm, a single process, and messages about contradictions."""

import os
import socket
import subprocess
import sys

import pytest

from dstrain.errors import TrainingError
from dstrain.parallel.launch_environment import (
    first_host,
    master_port,
    num_cores,
    rank_for_messages,
    rank_from_environment,
    tasks_per_node,
)
from tests.paths import ROOT
from tests.ports import free_port

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def place(rank: str, world_size: str, local_rank: str, local_world_size: str) -> dict[str, str]:
    return {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world_size}


def test_one_process() -> None:
    assert rank_from_environment({}) == place("0", "1", "0", "1")


def test_torchrun() -> None:
    environment = place("3", "4", "1", "2")
    assert rank_from_environment({**environment, "MASTER_ADDR": "a", "SLURM_STEP_NUM_TASKS": "2"}) == environment


def test_the_deepspeed_launcher() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    assert rank_from_environment(environment) == place("3", "4", "1", "2")


def test_srun_with_a_task_per_rank() -> None:
    port = str(master_port(4711, 2))
    assert rank_from_environment(SLURM) == {**place("5", "6", "1", "2"), "MASTER_ADDR": "gpu07", "MASTER_PORT": port}
    chosen = rank_from_environment({**SLURM, "MASTER_ADDR": "host", "MASTER_PORT": "5"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("host", "5")


def test_a_batch_script_and_a_step_of_one_task_have_one_process() -> None:
    assert rank_from_environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == place("0", "1", "0", "1")
    assert rank_from_environment({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == place("0", "1", "0", "1")


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
        ({"SLURM_PROCID": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 0),
        (SLURM, 5),
    ],
)
def test_messages_of_several_ranks_name_the_rank(environment: dict[str, str], rank: int | None) -> None:
    assert rank_for_messages(environment) == rank


def test_a_mistake_in_a_recipe_is_listed_by_rank_0_and_named_by_the_first_rank_of_another_machine() -> None:
    command = [sys.executable, "-m", "dstrain", "show", "translation/quickstart", "--set", "a=1", "--set", "b=2"]
    said = []
    for rank, local_rank in ("00", "11", "20"):
        place = {**os.environ, "RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=place, timeout=60)
        assert run.returncode == 1
        said.append(run.stderr.splitlines())
    first, beside_it, elsewhere = said
    assert len(first) > len(elsewhere) == 1
    assert beside_it == []
    assert "[rank 2] ERROR" in elsewhere[0]
    assert first[0].partition("ERROR")[2] == elsewhere[0].partition("ERROR")[2]


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3)", [2, 2, 2]), ("4(x2),1", [4, 4, 1]), ("1,2(x2),3", [1, 2, 2, 3])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login1", "login1"),
        ("a,b", "a"),
        ("gpu[03-05,9],login", "gpu03"),
        ("n[1,4]-ib.site", "n1-ib.site"),
        ("rack-2-[10-12]", "rack-2-10"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_cores_where_the_system_does_not_say_which_are_this_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS has none
    for count, cores in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert num_cores() == cores


def test_a_rank_without_a_world() -> None:
    with pytest.raises(TrainingError, match="RANK=1 is set but WORLD_SIZE is not; unset RANK, or start with deepspeed"):
        rank_from_environment({"RANK": "1"})


def failure(code: str, setup: str = "", **environment: str) -> str:
    """The message of the TrainingError that `build_mesh` ends with in a process of its own, after what it has logged."""
    program = f"""
import sys
from dstrain.log import setup_logging
sys.stderr = sys.stdout
setup_logging(rank=0)
from dstrain.errors import TrainingError
from dstrain.parallel import mesh
from dstrain.parallel.mesh import build_mesh
{setup}
try:
    build_mesh({code})
except TrainingError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = failure("'cpu'", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    meeting = f"rank 0 cannot meet the other ranks at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
    assert found == f"{meeting}: the port is in use; choose a free MASTER_PORT"


def test_a_rank_that_never_comes() -> None:
    found = failure(
        "'cpu'",
        "from datetime import timedelta; mesh.JOIN_TIMEOUT, mesh.NOTE_AFTER = timedelta(seconds=1), timedelta(seconds=0.2)",
        **{"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    )
    note, _, found = found.partition("\n")
    assert "WARNING rank 0 still waits for some of the 2 ranks at MASTER_ADDR=127.0.0.1 MASTER_PORT=" in note
    assert note.endswith("if one has failed, its output says why: stop the others and start again")
    assert found.startswith("rank 0 cannot meet the other ranks at MASTER_ADDR=127.0.0.1 MASTER_PORT=")
    assert "Timed out" in found
    assert "1/2 clients joined" in found


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 but MASTER_ADDR is not set: start with deepspeed, torchrun or srun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 does not fit WORLD_SIZE=2; start with deepspeed, torchrun or srun"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' in the environment is not a number; start with deepspeed, torchrun or srun"),
    ],
)
def test_contradictions(environment: dict[str, str], expected: str) -> None:
    assert failure("'cpu'", **environment) == expected


def test_a_gpu_that_is_not_there() -> None:
    expected = "device cuda was asked for, but torch sees no GPU; use --device cpu, or check the driver"
    assert failure("'cuda'", CUDA_VISIBLE_DEVICES="") == expected


@pytest.mark.parametrize(("environment", "threads"), [({"LOCAL_WORLD_SIZE": "10000"}, "1"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_ranks_of_a_node_share_its_cores(environment: dict[str, str], threads: str) -> None:
    program = "import torch; from dstrain.parallel.mesh import build_mesh; build_mesh('cpu'); print(torch.get_num_threads())"
    place = {"RANK": "0", "WORLD_SIZE": "1", **environment}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=place, timeout=60)
    assert run.stdout.strip() == threads, run.stderr
