"""The first words of a training: what recipe and environment say, before anything heavy is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from dstrain import __version__
from dstrain.engine.ds_config import read_ds_config
from dstrain.log import log_fields, logger
from dstrain.parallel.launch_environment import num_ranks
from dstrain.recipe import Recipe


def announce_training(recipe: Recipe, name: str, *, data: str, output: Path, base: Path | None) -> None:
    """Log what is going to be trained. name: of the recipe."""
    engine, training, validation = recipe.engine, recipe.training, recipe.validation
    stage = read_ds_config(engine).zero_optimization.stage
    ranks = num_ranks(os.environ)
    groups = [f"{name} {size}" for name, size in engine.parallel.model_dump().items() if size > 1]
    shared = f" ({' x '.join(groups)})" if groups else ""
    limits = {key: getattr(training, key) for key in ("max_steps", "max_epochs", "max_hours")}
    logger.info("dstrain %s trains %s", __version__, name)
    log_fields(
        {
            "data": data,
            "output": output,
            "start": _start(training.seed, output, base),
            "engine": f"{ranks} rank{'s' * (ranks > 1)}{shared}, {engine.precision}, ZeRO stage {stage} ({engine.deepspeed})",
            "step": f"{recipe.batching.tokens_per_step:,} target tokens",
            "until": ", ".join(f"{key} = {limit:,}" for key, limit in limits.items() if limit is not None),
            "validate": f"every {validation.every:,} {validation.unit}, by {validation.score_name}",
            "weights": None if training.ema is None else "moving average (EMA), in validations and bundles",
        }
    )


def _start(seed: int, output: Path, base: Path | None) -> str:
    if any((output / "checkpoints").glob("step_*")):
        return "the latest checkpoint of that run"
    return f"initial weights of seed {seed}" if base is None else f"the weights of {base}"
