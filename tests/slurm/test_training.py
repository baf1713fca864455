"""Training on a real two-node Slurm, through the real launcher: the losses are those of two processes on one machine."""

import sys
from pathlib import Path

import pytest

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, curve, dstrain, events, settings, succeeds
from tests.slurm.cluster import Cluster, wait_for

pytestmark = pytest.mark.slurm

STEPS = 60
SETTINGS = ["--device", "cpu", *settings(*SMALL_DATA, *SMALL_TRAINING, f"training.max_steps={STEPS}")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared") / "data"
    succeeds(dstrain("prepare", RECIPE, "--output", directory, "--workers", "1", *settings(*SMALL_DATA)))
    return directory


@pytest.fixture(scope="module")
def local(data: Path) -> Path:
    """The run of two processes on this machine."""
    run = data.parent / "local"
    ranks = Ranks(["train", RECIPE, "--data", data, "--output", run, *SETTINGS], 2, data.parent / "local.log")
    assert ranks.wait() == [0, 0], ranks.output()
    return run


def submit(cluster: Cluster, data: Path, run: Path, *overrides: str) -> int:
    chosen = [*SETTINGS, *settings(*overrides)]
    words = ("--nodes", "2", f"--output={run}.job.log", "slurm/train.sbatch", RECIPE, data, run, *chosen)
    return cluster.submit(*words, DSTRAIN_VENV=sys.prefix, OMP_NUM_THREADS="1")


def output(run: Path) -> str:
    """What the job and its ranks printed, for a failing test."""
    return "".join(path.read_text() for path in (Path(f"{run}.job.log"), *Path(f"{run}.slurm").glob("*.log")))


def test_two_nodes_train_as_two_processes_do(cluster: Cluster, data: Path, local: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    end = cluster.wait(submit(cluster, data, run), 120)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), output(run)
    assert [event["world_size"] for event in events(run, "start")] == [2]
    assert [step for step, *_ in curve(run)] == list(range(1, STEPS + 1))
    assert curve(run) == curve(local)


def test_a_requeued_job_continues_the_same_curve(cluster: Cluster, data: Path, local: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, data, run)
    wait_for(lambda: len(events(run, "train")) >= 5, 240, f"five steps in {run}")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    end = cluster.wait(job, 180)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), output(run)
    assert "stopped with exit code 85: back into the queue" in output(run)
    assert [5 <= event["step"] < STEPS for event in events(run, "resume")] == [True]
    assert curve(run) == curve(local)


def test_a_job_requeued_with_another_number_of_nodes_goes_on(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """Without dropout, whose masks depend on the rank, one node continues the curve of two."""
    run, whole, no_dropout = tmp_path / "run", tmp_path / "whole", "model.dropout=0.0"
    job = submit(cluster, data, run, no_dropout)
    wait_for(lambda: len(events(run, "train")) >= 5, 240, f"five steps in {run}")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", 120, f"job {job} back in the queue")
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=1-1", "NumTasks=1")
    end = cluster.wait(job, 300)
    assert (end["JobState"], end["Restarts"], end["NumNodes"]) == ("COMPLETED", "1", "1"), output(run)
    (resume,) = events(run, "resume")
    assert (resume["layout_before"], resume["layout"]) == ("2 ranks zero1 fp32", "1 rank zero1 fp32"), output(run)
    assert 5 <= resume["step"] < STEPS
    words = ["train", RECIPE, "--data", data, "--output", whole, *SETTINGS, *settings(no_dropout)]
    single = Ranks(words, 1, tmp_path / "whole.log")
    assert single.wait() == [0], single.output()
    found, expected = ({event["step"]: event for event in events(path, "train")} for path in (run, whole))
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, event in expected.items():
        assert found[step]["num_targets"] == event["num_targets"]
        assert found[step]["loss"] == pytest.approx(event["loss"], rel=1e-5)
