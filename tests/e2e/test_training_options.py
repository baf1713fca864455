"""StableAdamW, a mean over sentences and R-Drop, from the recipe through the command line to the events and the bundle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, dstrain, events, fails, settings, succeeds

OPTIONS = (
    "optimizer={kind: stable_adamw, learning_rate: 0.003, betas: [0.9, 0.98], eps: 1.0e-6, weight_decay: 0.01}",
    "objective={kind: cross_entropy, average: sentences, r_drop: {alpha: 5}}",
    "training.max_steps=8",
)


def test_one_run_with_all_three(data: Path, tmp_path: Path) -> None:
    words = settings(*SMALL_DATA, *SMALL_TRAINING, *OPTIONS)
    shown = yaml.safe_load(succeeds(dstrain("show", RECIPE, *words)).stdout)
    assert shown["optimizer"]["kind"] == "stable_adamw"
    assert shown["objective"] == {
        "kind": "cross_entropy",
        "label_smoothing": 0.1,
        "average": "sentences",
        "r_drop": {"alpha": 5.0},
        "chunk_tokens": "auto",
    }
    run = tmp_path / "run"
    succeeds(dstrain("train", RECIPE, "--data", data, "--output", run, *words))
    trained, validated = events(run, "train"), events(run, "valid")
    assert [event["step"] for event in trained] == list(range(1, 9))
    for event in trained:
        assert event["kl"] > 0
        assert event["perplexity"] == pytest.approx(math.exp(event["nll"]))
    assert trained[-1]["nll"] < trained[0]["nll"]
    assert all("kl" not in event for event in validated)
    scores = json.loads(succeeds(dstrain("validate", run / "bundles" / "best", "--data", data, "--no-generate")).stdout)
    best = next(event for event in validated if event["step"] == validated[-1]["best_step"])
    assert scores["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert scores["nll"] == pytest.approx(best["nll"], rel=1e-6)


def test_r_drop_without_dropout_is_a_mistake_of_the_recipe() -> None:
    fails(
        dstrain("show", RECIPE, *settings("model.dropout=0", "objective.r_drop.alpha=1")), "objective.r_drop.alpha = 1.0 has no"
    )
