"""Settings beyond the end of a run are refused or told, each with both numbers, and others are left alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dstrain.build.training_plan import TrainOptions, plan_training
from dstrain.cli.main import main
from dstrain.data.prepared.prepare import prepare
from dstrain.errors import RecipeError
from dstrain.recipe_file import load_recipe, recipe_names
from dstrain.training.horizons import Horizons

STEPS = "(the run has 500 steps: training.max_steps = 500)"
"""Of the quickstart, which the cases below change."""
FALLING = "kind: cosine, warmup_steps: 10"
TOLD = {
    "schedule.warmup_steps=500": "warmup_steps = 500: the learning rate reaches 0.00299, never optimizer.learning_rate = 0.003",
    f"schedule={{{FALLING}, total_steps: 1000}}": "schedule.total_steps = 1000: the learning rate ends at 0.00153, not at 0",
    f"schedule={{{FALLING}, total_steps: 499, final: 1.e-5}}": "= 499: from there on the learning rate stays at 1e-05",
    "training.ema={decay: 0.999}": "training.ema.decay = 0.999 is a memory of 1,000 steps: the decay does not rise beyond 0.982",
    "training.ema={decay: 0.9, start_step: 500}": "ema.start_step = 500: bundles hold the weights themselves, not an average",
    "training.ema={decay: 0.9, start_step: 495}": "ema.decay = 0.9 is a memory of 10 steps: the decay does not rise beyond 0.4",
    "validation.every=501": "validation.every = 501 steps: the one validation is that at the end",
    "validation.patience=5": "validation.patience = 5: there are 5 validations, too few to stop training",
    "checkpoint.every=501": "checkpoint.every = 501 steps: the one checkpoint is that at the end",
    "reporting.log_every=501": "reporting.log_every = 501: no step is reported before the end",
}
SILENT = [
    "schedule.warmup_steps=499",
    f"schedule={{{FALLING}, total_steps: 500}}",
    f"schedule={{{FALLING}, total_steps: 510}}",
    "training.ema={decay: 0.998}",
    "training.ema={decay: 0.9, start_step: 490}",
    "validation.every=500",
    "validation.patience=4",
    "validation={unit: epochs, every: 1000}",
    "checkpoint.every=500",
    "reporting.log_every=500",
]


BY_EPOCHS = ("training.max_steps=null", "training.max_epochs=12")


def warnings(*overrides: str, steps_per_epoch: int | None = None) -> list[str]:
    return Horizons(load_recipe("translation/quickstart", overrides), steps_per_epoch).warnings()


@pytest.mark.parametrize("override", TOLD)
def test_a_setting_beyond_the_end_is_told(override: str) -> None:
    (line,) = warnings(override)
    assert line.endswith(f"{TOLD[override]} {STEPS}")


@pytest.mark.parametrize("override", SILENT)
def test_a_setting_within_the_run_is_not(override: str) -> None:
    assert not warnings(override)


def test_epochs_are_steps_once_the_data_is_known() -> None:
    by_epochs = ("training.max_steps=null", "training.max_epochs=3")
    late = (*by_epochs, "reporting.log_every=37", "validation={unit: epochs, every: 4}")
    assert not warnings(*late)
    found = warnings(*late, "schedule.warmup_steps=1", "checkpoint.every=1", steps_per_epoch=12)
    assert found == [
        "validation.every = 4 epochs: the one validation is that at the end "
        "(the run has 36 steps: training.max_epochs = 3 (36 steps))",
        "reporting.log_every = 37: no step is reported before the end (the run has 36 steps: training.max_epochs = 3 (36 steps))",
    ]


def test_a_run_of_hours_has_no_known_end() -> None:
    by_hours = ("training.max_steps=null", "training.max_hours=1.5")
    assert warnings(*by_hours) == [
        "training.max_hours alone ends the run, so it is unknown at which step: warm-up, moving average and intervals are not "
        "compared with it"
    ]
    (line,) = warnings(*by_hours, f"schedule={{{FALLING}, total_steps: 400}}")
    assert "from step 400 (schedule.total_steps) on it would train at a learning rate of 0; set training.max_steps = 400" in line


def test_no_shipped_recipe_is_warned_of() -> None:
    assert {name: found for name in recipe_names() if (found := Horizons(load_recipe(name)).warnings())} == {}


def test_steps_at_learning_rate_zero_are_refused_when_the_data_tells_their_number(tmp_path: Path) -> None:
    small = ("data.train.0.num_pairs=60", "data.valid.0.num_pairs=5", "data.test={}", "data.tokenizer.vocab_size=120")
    recipe = load_recipe(
        "translation/quickstart",
        [*small, "batching.tokens_per_step=256", *BY_EPOCHS, f"schedule={{{FALLING}, total_steps: 12}}"],
    )
    prepare(recipe.data, tmp_path / "data", workers=1, progress=False)
    options = TrainOptions(data=tmp_path / "data", output=tmp_path / "run")
    with pytest.raises(RecipeError) as caught:
        plan_training(recipe, options)
    steps = int(str(caught.value).split("(")[1].split()[0])
    assert f"training.max_epochs = 12 ({steps} steps) goes beyond schedule.total_steps = 12, where the learning" in str(
        caught.value
    )
    assert f"raise total_steps to {steps}, or set training.max_steps = 12" in str(caught.value)
    longer = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"total_steps": steps})})
    assert plan_training(longer, options).steps.steps_per_epoch() * 12 == steps


def test_show_tells_it_beside_the_recipe(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.WARNING, "dstrain"):
        assert main(["show", "translation/quickstart", "--set", "reporting.log_every=900"]) == 0
    captured = capsys.readouterr()
    assert "reporting.log_every = 900: no step is reported" in captured.err + caplog.text
    assert captured.out.startswith("version: 1")
