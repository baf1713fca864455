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
    """A template, the recipe it is tried with, its nodes, and whether its fourth word is a bundle."""

    template: str
    recipe: str
    nodes: int = 1
    takes_a_bundle: bool = False


JOBS = [
    Job("pretrain", "language_modeling/wikitext_tiny", nodes=2),
    Job("multilingual", "translation/quickstart", nodes=2),
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
    toys, submitted = Toys(tmp_path, STEPS), {}
    for job in JOBS:
        other = STARTS_FROM.get(job.recipe) or LEARNS_FROM.get(job.recipe) or "translation/multi30k_tiny"
        bundle = [toys.bundle(other)] if job.takes_a_bundle else []
        template = ROOT / "slurm" / f"{job.template}.sbatch"
        words = [template, toys.file(job.recipe), toys.data(job.recipe), tmp_path / job.template, *bundle, "--device", "cpu"]
        shared = ("--oversubscribe", "--mem=100", f"--output={tmp_path}/{job.template}.log")
        variables = {"DSTRAIN_VENV": sys.prefix, "OMP_NUM_THREADS": "1", **toys.variables}
        submitted[job] = cluster.submit(*shared, *words, **variables)
    for job, number in submitted.items():
        end = cluster.wait(number, 240)
        printed = "".join(path.read_text() for path in tmp_path.glob(f"{job.template}*/*.log"))
        assert (end["JobState"], end["NumNodes"]) == ("COMPLETED", str(job.nodes)), (job, printed)
        (start,) = events(tmp_path / job.template, "start")
        assert start["world_size"] == job.nodes
        assert len(events(tmp_path / job.template, "train")) == STEPS
