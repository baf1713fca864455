"""A dump of logits as an array of jobs on a real two-node Slurm: what its tasks make is what one process makes."""

import sys
from pathlib import Path

import pytest

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, dstrain, fails, settings, succeeds
from tests.paths import ROOT
from tests.slurm.cluster import Cluster, wait_for

pytestmark = pytest.mark.slurm

TEMPLATE = ROOT / "slurm" / "array.sbatch"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """What is to be dumped: a teacher of two steps, its data, five parts."""
    directory = tmp_path_factory.mktemp("array")
    data, run = directory / "data", directory / "run"
    succeeds(dstrain("prepare", RECIPE, "--output", data, "--workers", "1", *settings(*SMALL_DATA)))
    short = settings(*SMALL_DATA, *SMALL_TRAINING, "training.max_steps=2")
    succeeds(dstrain("train", RECIPE, "--data", data, "--output", run, "--device", "cpu", *short))
    return ["dump-logits", "--teacher", run / "bundles/last", "--data", data, "--tokens-per-shard", "600", "--device", "cpu"]


def test_the_tasks_of_an_array_make_what_one_process_makes(cluster: Cluster, words: list[str | Path], tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    succeeds(dstrain(*words, "--output", whole))
    place = ("--array=3-5", f"--output={tmp_path}/%a.log", TEMPLATE)
    job = cluster.submit(*place, *words, "--output", shared, DSTRAIN_VENV=sys.prefix, OMP_NUM_THREADS="1")
    for task in (3, 4, 5):
        end = cluster.wait(f"{job}_{task}", 120)
        assert end["JobState"] == "COMPLETED", (tmp_path / f"{task}.log").read_text()
        assert f"share {task - 3}/3" in (tmp_path / f"{task}.log").read_text()
    fails(dstrain("inspect", shared), "--merge")
    succeeds(dstrain("dump-logits", "--merge", shared))
    shards = sorted(file.name for file in whole.glob("*.arrow"))
    assert len(shards) > 3
    assert all((whole / name).read_bytes() == (shared / name).read_bytes() for name in shards)


def test_a_task_that_is_asked_to_stop_goes_back_into_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    """A stand-in for `dstrain` that waits at its first start."""
    program = tmp_path / "venv" / "bin" / "dstrain"
    program.parent.mkdir(parents=True)
    program.write_text('#!/usr/bin/env bash\necho "$*"\n[ -n "${SLURM_RESTART_COUNT:-}" ] || exec sleep 120\n')
    program.with_name("deepspeed").write_text("")
    for file in program.parent.iterdir():
        file.chmod(0o755)
    log = tmp_path / "log"
    job = cluster.submit("--array=0-0", f"--output={log}", TEMPLATE, "pseudo-label", "a b", DSTRAIN_VENV=str(tmp_path / "venv"))
    wait_for(lambda: log.is_file() and "pseudo-label a b --shard 0/1" in log.read_text(), 40, "the first start")
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    end = cluster.wait(f"{job}_0", 60)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert log.read_text().count("pseudo-label a b --shard 0/1") == 2


def test_without_an_array_nothing_starts(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = cluster.submit(f"--output={log}", TEMPLATE, "dump-logits")
    assert cluster.wait(job, 30)["ExitCode"] == "2:0"
    assert "this template is for arrays: add --array 0-7" in log.read_text()
