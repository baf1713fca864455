"""The job template on a real Slurm, with a stand-in for `deepspeed`: what it is given, and how each ending is handled."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dstrain.parallel.launch_environment import master_port
from tests.paths import ROOT
from tests.slurm.cluster import Cluster, ClusterError, wait_for

pytestmark = pytest.mark.slurm

TEMPLATE = ROOT / "slurm" / "train.sbatch"

# Writes down what it was given, then behaves as its recipe says; ready as soon as its file is complete.
STAND_IN = """#!/usr/bin/env python3
import json, os, signal, socket, sys, time
from pathlib import Path

words = sys.argv[1:]
recipe, run = words[words.index("train") + 1], Path(words[words.index("--output") + 1])
start, asked = int(os.environ.get("SLURM_RESTART_COUNT", 0)), []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
hosts = Path(words[words.index("--hostfile") + 1]).read_text().splitlines()
names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "WRAPPED")
record = {"words": words, "hosts": hosts, "environment": {name: os.environ.get(name) for name in names}}
run.mkdir(parents=True, exist_ok=True)
file = run / f"{socket.gethostname()}-{start}"
file.with_suffix(".part").write_text(json.dumps(record))
file.with_suffix(".part").rename(file.with_suffix(".json"))
print("on", socket.gethostname(), "start", start, flush=True)
if recipe == "fails":
    sys.exit("the loss is not finite")
if recipe == "waits" and start == 0:
    while not asked:
        time.sleep(0.05)
    (run / f"asked-{socket.gethostname()}").write_text(signal.Signals(asked[0]).name)
    sys.exit(85)
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    program = tmp_path / "venv" / "bin" / "deepspeed"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return tmp_path / "venv"


def submit(cluster: Cluster, venv: Path, recipe: str, *options: str, **variables: str) -> tuple[int, Path]:
    """A job on two nodes -> its id and its run directory."""
    run = venv.parent / "run"
    variables = {"DSTRAIN_VENV": str(venv)} | variables
    words = ("--nodes=2", f"--chdir={venv.parent}", "--output=job.log", *options, TEMPLATE)
    return cluster.submit(*words, recipe, "data", run, "--set", "a.b=c d", **variables), run


def records(run: Path, start: int = 0) -> list[dict[str, Any]]:
    """What the stand-ins on both nodes wrote down, as soon as they have."""
    files = [run / f"{node}-{start}.json" for node in ("node1", "node2")]
    wait_for(lambda: all(file.is_file() for file in files), 40, f"{files}")
    return [json.loads(file.read_text()) for file in files]


def test_every_node_gets_its_rank_and_the_same_rest(cluster: Cluster, venv: Path) -> None:
    job, run = submit(cluster, venv, "ends")
    assert cluster.wait(job, 30)["JobState"] == "COMPLETED"
    for rank, record in enumerate(records(run)):
        place = ["--num_nodes", "2", "--num_gpus", "1", "--master_addr", "node1", "--master_port", str(master_port(job))]
        program = ["--module", "dstrain", "train", "ends", "--data", "data", "--output", str(run), "--set", "a.b=c d"]
        hostfile = f"{run}.slurm/slurm-{job}.hostfile"
        launcher = ["--node_rank", str(rank), "--log_level", "warning", "--hostfile", hostfile, "--no_ssh", *place]
        assert record["words"] == launcher + program
        assert record["hosts"] == ["node1 slots=1", "node2 slots=1"]
        assert record["environment"] == {"OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cpu", "WRAPPED": None}


def test_ranks_threads_and_container_are_variables(cluster: Cluster, venv: Path) -> None:
    program = {"PATH": f"{venv}/bin:{os.environ['PATH']}", "DSTRAIN_CONTAINER": "env WRAPPED=yes"}
    job, run = submit(cluster, venv, "ends", DSTRAIN_RANKS_PER_NODE="2", **program)
    assert cluster.wait(job, 30)["JobState"] == "COMPLETED"
    for record in records(run):
        assert record["hosts"] == ["node1 slots=2", "node2 slots=2"]
        assert record["environment"] == {"OMP_NUM_THREADS": "2", "DS_ACCELERATOR": "cpu", "WRAPPED": "yes"}


def test_a_failure_is_shown_and_not_repeated(cluster: Cluster, venv: Path) -> None:
    job, run = submit(cluster, venv, "fails")
    end = cluster.wait(job, 30)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "1:0", "0")
    assert f"failed with exit code 1; the last lines of {run}.slurm/slurm-{job}.log" in (venv.parent / "job.log").read_text()
    assert "the loss is not finite" in (venv.parent / "job.log").read_text()


def test_before_the_time_limit_the_ranks_are_asked_and_the_job_is_requeued(cluster: Cluster, venv: Path) -> None:
    job, run = submit(cluster, venv, "waits", "--time=1", "--signal=B:USR1@55")
    assert cluster.wait(job, 90)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    assert [(run / f"asked-{node}").read_text() for node in ("node1", "node2")] == ["SIGUSR1", "SIGUSR1"]
    messages = (venv.parent / "job.log").read_text()
    order = ["start 1:", "asking all ranks", "stopped with exit code 85: back into the queue", "start 2:", "done"]
    assert [messages.find(words) >= 0 for words in order] == [True] * 5
    assert sorted(order, key=messages.find) == order
    output = Path(f"{run}.slurm/slurm-{job}.log").read_text()
    assert sorted(output.splitlines()) == [f"{rank}: on node{rank + 1} start {start}" for rank in (0, 1) for start in (0, 1)]


def test_a_canceled_job_stops_its_ranks_gently_and_stays_canceled(cluster: Cluster, venv: Path) -> None:
    job, run = submit(cluster, venv, "waits")
    records(run)
    cluster.run("scancel", str(job))
    assert cluster.wait(job, 30)["JobState"] == "CANCELLED"
    wait_for(lambda: len(list(run.glob("asked-*"))) == 2, 5, "the ranks to be asked")
    assert {file.read_text() for file in run.glob("asked-*")} == {"SIGTERM"}
    assert cluster.job(job)["Restarts"] == "0"


def test_mistakes_are_named_before_anything_starts(cluster: Cluster, venv: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    output = (f"--chdir={tmp_path}", "--output=%j.log")
    usage = cluster.submit(*output, TEMPLATE, "recipe", "data", DSTRAIN_VENV=nowhere)
    venv_missing = cluster.submit(*output, TEMPLATE, "recipe", "data", "run", DSTRAIN_VENV=nowhere)
    home_missing = cluster.submit(*output, TEMPLATE, "recipe", "data", "run", DSTRAIN_HOME=str(tmp_path))
    messages = {
        usage: "usage: sbatch --nodes N slurm/train.sbatch RECIPE DATA RUN",
        venv_missing: f"no deepspeed in {nowhere}: ",
        home_missing: "submit from the checkout, or export DSTRAIN_HOME",
    }
    for job, message in messages.items():
        assert cluster.wait(job, 30)["ExitCode"] == "2:0"
        assert message in (tmp_path / f"{job}.log").read_text()


def test_sbatch_accepts_the_options_of_every_template(cluster: Cluster) -> None:
    for template in sorted((ROOT / "slurm").glob("*.sbatch")):
        cluster.run("sbatch", "--test-only", template)
        with pytest.raises(ClusterError, match="invalid partition specified: nowhere"):
            cluster.run("sbatch", "--test-only", "--partition=nowhere", template)


def test_the_template_takes_the_nodes_that_there_are(cluster: Cluster) -> None:
    cluster.run("sbatch", "--test-only", "--nodes=2", TEMPLATE)
    with pytest.raises(ClusterError, match="Requested node configuration is not available"):
        cluster.run("sbatch", "--test-only", "--nodes=3", TEMPLATE)
