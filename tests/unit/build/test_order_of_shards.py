"""The recipe's `batching.shuffle` decides the order of the shards that the data has."""

from pathlib import Path

import numpy as np
import pytest

from dstrain.api import load_recipe
from dstrain.build import training_data
from dstrain.build.training_data import TrainingData
from dstrain.data.batching.order import ShuffledOrder
from dstrain.data.batching.plan import StepPlan
from dstrain.data.batching.shard_window import build_shuffle
from dstrain.data.prepared.prepare import prepare
from dstrain.data.shuffling import ShardWindowShuffle
from dstrain.recipe import Recipe
from tests.e2e.support import RECIPE, SMALL_DATA

PAIRS, PER_SHARD = 10_000, 1_000


def recipe_with(*overrides: str) -> Recipe:
    sizes = ("data.train.0.num_pairs=10000", f"data.pairs_per_shard={PER_SHARD}")
    batching = "batching={tokens_per_step: 700, max_tokens: 400, shuffle_window: 1000}"
    return load_recipe(RECIPE, [*SMALL_DATA[1:], *sizes, batching, *overrides])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "data"
    prepare(recipe_with().data, directory, workers=1, progress=False)
    return directory


def test_steps_stay_near_the_shards_of_the_data(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_with("batching.shuffle={kind: shard_window, shards: 2}")
    plan = TrainingData(data, recipe).plan_steps(recipe)
    steps = [step.examples for step in plan.epoch(1)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(PAIRS))
    shards = [range(start, start + PER_SHARD) for start in range(0, PAIRS, PER_SHARD)]
    order = ShuffledOrder(shards, 1000, recipe.training.seed, shuffle=build_shuffle(ShardWindowShuffle(shards=2)))
    expected = StepPlan(plan.lengths, recipe.batching, recipe.training.seed, order=order).epoch(1)
    assert [step.examples.tolist() for step in expected] == [step.tolist() for step in steps]
    assert len(np.unique(np.concatenate(steps[:5]) // PER_SHARD)) < 10
    assert not [text for text in caplog.messages if "stay mapped" in text]


def test_many_shards_read_all_at_once_are_warned_of(
    data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data, "MAX_OPEN_SHARDS", 9)
    TrainingData(data, recipe_with("batching.shuffle={kind: shard_window, shards: 2}"))
    assert not [text for text in caplog.messages if "stay mapped" in text]
    TrainingData(data, recipe_with())
    assert [
        text for text in caplog.messages if "reads from all 10 shards, of which 9 stay mapped; choose batching.shuffle" in text
    ]
