"""The template of every job on a real two-node Slurm, through the real launcher, each with a shipped recipe at toy size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.support import events
from tests.paths import ROOT
from tests.slurm.cluster import Cluster
from tests.toy_recipes import LEARNS_FROM, STARTS_FROM, Toys

pytestmark = pytest.mark.slurm

STEPS = 3


class Job(NamedTuple):
    """A template, the recipe and the DeepSpeed file it is tried with, its nodes, and whether its fourth word is a bundle."""

    template: str
    recipe: str
    file: str = "zero1"
    nodes: int = 1
    takes_a_bundle: bool = False


JOBS = [
    Job("pretrain", "pretraining/wikitext_denoising_tiny", "zero1_cluster", nodes=2),
    Job("multilingual", "translation/multi30k_multilingual", "zero1_cluster", nodes=2),
    Job("finetune", "translation/multi30k_tiny", takes_a_bundle=True),
    Job("finetune_lora", "translation/multi30k_tiny_lora", takes_a_bundle=True),
    Job("distill", "translation/multi30k_tiny_kd", takes_a_bundle=True),
    Job("extend_context", "language_modeling/wikitext_extend", takes_a_bundle=True),
]


def test_there_is_a_job_for_every_template() -> None:
    """Besides those that have tests of their own."""
    templates = {path.stem for path in (ROOT / "slurm").glob("*.sbatch")}
    assert templates - {"train", "array"} == {job.template for job in JOBS}


def test_every_job_trains_its_recipe(cluster: Cluster, tmp_path: Path) -> None:
    """All at once, with nodes shared: a template asks for whole ones."""
    toys, submitted = Toys(tmp_path, STEPS), []
    for job in JOBS:
        other = STARTS_FROM.get(job.recipe) or LEARNS_FROM.get(job.recipe) or "translation/multi30k_tiny"
        bundle = [toys.bundle(other)] if job.takes_a_bundle else []
        template = ROOT / "slurm" / f"{job.template}.sbatch"
        words = [template, toys.file(job.recipe), toys.data(job.recipe), tmp_path / job.template, *bundle]
        words += ["--device", "cpu", "--set", f"engine.deepspeed={job.file}"]
        shared = ("--oversubscribe", "--mem=100", f"--output={tmp_path}/{job.template}.log")
        variables = {"DSTRAIN_VENV": sys.prefix, "OMP_NUM_THREADS": "1", **toys.variables}
        submitted.append((job, bundle, cluster.submit(*shared, *words, **variables)))
    for job, bundle, number in submitted:
        end = cluster.wait(number, 240)
        printed = (tmp_path / f"{job.template}.log").read_text()
        printed += "".join(path.read_text() for path in (tmp_path / f"{job.template}.slurm").glob("*.log"))
        assert (end["JobState"], end["NumNodes"]) == ("COMPLETED", str(job.nodes)), (job, printed)
        if job.recipe not in LEARNS_FROM:  # which is refused without its teacher
            assert all(str(path) in printed for path in bundle), (job, printed)
        (start,) = events(tmp_path / job.template, "start")
        assert (start["world_size"], start["recipe"]["engine"]["deepspeed"]) == (job.nodes, job.file)
        assert len(events(tmp_path / job.template, "train")) == STEPS
