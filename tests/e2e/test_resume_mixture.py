"""A mixture goes on where it was: corpora drawn by shares that change at an epoch, stopped, resumed, on other ranks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, dstrain, events, settings, succeeds

CORPORA = [
    f"{{kind: grammar, split: train, num_pairs: {pairs}, seed: {seed}, name: {name}}}"
    for name, pairs, seed in (
        ("large", 150, 1),
        ("small", 40, 2),
    )
]
DATA = (
    *SMALL_DATA[1:],
    f"data.train=[{', '.join(CORPORA)}]",
    "data.valid=[{kind: grammar, split: valid, num_pairs: 10, name: large}]",
)
CURRICULUM = (
    "{kind: weights, examples_per_epoch: 90, weights: {large: 2, small: 1},"
    " changes: [{from_epoch: 2, weights: {large: 1, small: 2}}]}"
)
TEMPERATURE = "{kind: temperature, temperature: 3, examples_per_epoch: 90}"
CASES = [
    pytest.param(CURRICULUM, 1, 1e-5, id="weights-1to2ranks"),
    pytest.param(CURRICULUM, 2, 0.0, id="weights-2ranks", marks=pytest.mark.slow),
    pytest.param(TEMPERATURE, 1, 1e-5, id="temperature-1to2ranks", marks=pytest.mark.slow),
    pytest.param(TEMPERATURE, 2, 0.0, id="temperature-2ranks", marks=pytest.mark.slow),
]
"""How the corpora are mixed, ranks before the stop, and the tolerance: on as many ranks a run is the same bit for bit."""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture") / "data"
    succeeds(dstrain("prepare", RECIPE, "--output", directory, "--workers", "1", *settings(*DATA)))
    return directory


def train(run: Path, data: Path, num_ranks: int, steps: int, sampling: str) -> None:
    chosen = settings(*DATA, *SMALL_TRAINING, f"batching.sampling={sampling}", f"training.max_steps={steps}")
    words = ["train", RECIPE, "--data", data, "--output", run, "--device", "cpu", *chosen]
    ranks = Ranks(words, num_ranks, run.with_suffix(".log"))
    assert ranks.wait() == [0] * num_ranks, ranks.output()


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What a step has in common with that of another run."""
    kept = ("step", "epoch", "loss", "nll/large", "nll/small", "num_targets", "grad_norm", "learning_rate")
    return [{key: event[key] for key in kept} for event in events(run, "train")]


@pytest.mark.parametrize(("sampling", "ranks_before", "tolerance"), CASES)
def test_stopped_in_the_middle_of_an_epoch_and_resumed_on_two_ranks(
    sampling: str, ranks_before: int, tolerance: float, mixture: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, mixture, 2, 8, sampling)
    expected = steps_of(whole)
    epochs = [step["epoch"] for step in expected]
    assert epochs[2] == epochs[3] == 1, "step 3 is in the middle of the epoch before the change"
    assert epochs[-1] > 1

    train(stopped, mixture, ranks_before, 3, sampling)
    train(stopped, mixture, 2, 8, sampling)
    for found, step in zip(steps_of(stopped), expected, strict=True):
        assert found == pytest.approx(step, rel=tolerance, abs=0)
