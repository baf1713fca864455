"""Training that starts from a bundle: its weights, and an adapter over them where the recipe has one.

Only what training alone knows of (dropout, dropped layers) may differ between the base's architecture and the recipe's.
"""

from __future__ import annotations

import math
from collections.abc import Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dstrain.adapters.config import AdapterConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject
from dstrain.batch import Batch
from dstrain.checkpoint.bundle import Bundle, load_bundle
from dstrain.checkpoint.files import together
from dstrain.data.manifest import Manifest
from dstrain.errors import BundleError, TrainingError
from dstrain.models.config import ModelConfig
from dstrain.models.factory import Model, build_model
from dstrain.models.portable import load_portable, to_portable
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.topology import World
from dstrain.training.run_directory import recipe_differences
from dstrain.training.validator import Evaluates, WholeModel

TRAINING_ALONE = {"dropout", "attention_dropout", "activation_dropout", "layer_drop"}
"""Keys of a model that change nothing outside training."""


def load_base(directory: Path, model: ModelConfig, manifest: Manifest) -> Bundle:
    """The bundle that training starts from. manifest: of the data.

    BundleError where it is another model than the recipe's or has no tokenizer, DataError where the data has another one.
    """
    bundle = load_bundle(directory)
    if bundle.tokenizers is None:
        raise BundleError(f"--base {directory} has no tokenizer, so it cannot be told whether the ids of the data are its own")
    manifest.require_tokenizer(bundle.tokenizers.fingerprint, f"--base {directory}")
    base, recipe = (
        _without(TRAINING_ALONE, {"model": config.model_dump(mode="json")}) for config in (bundle.model_config, model)
    )
    if differences := recipe_differences(base, recipe):
        raise BundleError(
            f"--base {directory} is another model than the recipe's (base -> recipe):\n"
            + "\n".join(differences)
            + "\ngive the recipe the base's values (--set KEY=VALUE), or name another base"
        )
    return bundle


def build_on_base(base: Bundle, config: ModelConfig, adapter: AdapterConfig | None, seed: int) -> Model:
    """The recipe's model with the base's weights; with an adapter, all else is frozen."""
    model = build_model(config, base.vocabulary, projections="fused" if adapter is None else "separate", seed=None)
    load_portable(model, to_portable(base.model))
    if adapter is not None:
        inject(model, adapter, seed=seed)
        freeze(model, adapter)
    return model


def check_reloaded(directory: Path, engine: Evaluates, batch: Batch, world: World, *, averaged: bool, tolerance: float) -> None:
    """Read the bundle `directory` as a user will and compare what it computes with what was trained. Collective.

    batch: of this rank. averaged: bundles hold the moving average. tolerance: of the loss, relative; the engine may compute in 16
    bits. TrainingError, on every rank, where the two differ, BundleError where the bundle cannot be read.
    """
    with engine.averaged_weights() if averaged else nullcontext():
        trained = float(engine.evaluate(batch).sums["nll"])

    def compare() -> None:
        model = load_bundle(directory, device=world.device).model
        plain = WholeModel(TrainModule(model, CrossEntropy(CrossEntropyConfig())), model, world.device)
        reloaded = float(plain.evaluate(batch).sums["nll"])
        if not math.isclose(trained, reloaded, rel_tol=tolerance, abs_tol=tolerance):
            raise TrainingError(
                f"{directory} does not compute what was trained: the same {batch.num_targets} tokens have a loss of {reloaded:.6g} "
                f"after reloading, {trained:.6g} before; do not use it, and train again from the last checkpoint"
            )

    together(world, TrainingError, f"reading {directory} back", compare)


def _without(keys: Set[str], tree: Any) -> Any:
    """A tree of plain values without these keys at any depth."""
    if isinstance(tree, dict):
        return {key: _without(keys, value) for key, value in tree.items() if key not in keys}
    return tree
