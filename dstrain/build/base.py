"""Training that starts from a bundle: its weights, and an adapter over them if the recipe has one.

Between the base's architecture and the recipe's may differ what acts in training alone (dropout, dropped layers), the longest
sequences if positions have no weights, and the scaling of rotary positions if the base has none: context extension.
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
from dstrain.checkpoint.bundle import StoredBundle, find_bundle, load_bundle
from dstrain.data.prepared.manifest import DataManifest
from dstrain.errors import BundleError, TrainingError
from dstrain.evaluation.validator import Evaluates, WholeModel
from dstrain.models.config import ModelConfig
from dstrain.models.factory import Model, Projections, build_model
from dstrain.models.position_config import RotaryPosition
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.errors import raise_on_all_ranks
from dstrain.parallel.group import Group
from dstrain.parallel.mesh import Mesh
from dstrain.protocols import WeightSource
from dstrain.training.run_directory import recipe_differences

LENGTHS = {"max_source_length", "max_target_length"}
"""Keys of a model that no weight depends on, unless positions are learned."""
TRAINING_ALONE = {"dropout", "attention_dropout", "activation_dropout", "layer_drop"}
"""Keys of a model that change nothing outside training."""


def find_base(directory: Path, model: ModelConfig, manifest: DataManifest, *, adapted: bool = False) -> StoredBundle:
    """The bundle that training starts from, whose weights are not read yet. manifest: of the data.

    adapted: an adapter is trained over it; then lengths and scaling stay, too, as an adapter bundle has those of its base.

    BundleError if it is another model than the recipe's or has no tokenizer, DataError if the data has another one.
    """
    bundle = find_bundle(directory)
    if bundle.description.tokenizer is None:
        raise BundleError(f"--base {directory} has no tokenizer, so it is unknown whether the ids of the data are its own")
    manifest.require_tokenizer(bundle.description.tokenizer, f"--base {directory}")
    own = bundle.description.model if adapted else _scaled_as(model, bundle.description.model)
    sides = [{"model": config.model_dump(mode="json")} for config in (own, model)]
    free = TRAINING_ALONE if adapted or model.position.kind == "learned" else TRAINING_ALONE | LENGTHS
    if differences := recipe_differences(*(_without(free, side) for side in sides)):
        raise BundleError(
            f"--base {directory} is another model than the recipe's (base -> recipe):\n"
            + "\n".join(differences)
            + "\ngive the recipe the base's values (--set KEY=VALUE), or name another base"
        )
    return bundle


def _scaled_as(model: ModelConfig, base: ModelConfig) -> ModelConfig:
    """The base's architecture with the scaling of `model`, if both have rotary positions and the base's are not scaled yet."""
    if not (isinstance(model.position, RotaryPosition) and isinstance(base.position, RotaryPosition)):
        return base
    if base.position.scaling.kind != "none":
        return base
    position = base.position.model_copy(update={"scaling": model.position.scaling})
    return base.model_copy(update={"position": position})


def build_on_base(
    base: StoredBundle,
    config: ModelConfig,
    adapter: AdapterConfig | None,
    *,
    seed: int,
    tensor: Group | None = None,
    sequence: Group | None = None,
) -> tuple[Model, WeightSource]:
    """The recipe's model on the meta device, and its weights: the base's; with an adapter, all else is frozen.

    tensor: the ranks that share one copy of the parameters; sequence: those that share the tokens of a batch.
    """
    projections: Projections = "fused" if adapter is None else "separate"
    vocabulary = base.description.vocabulary
    model = build_model(config, vocabulary, projections=projections, seed=None, tensor=tensor, sequence=sequence)
    if adapter is None:
        return model, base
    weights = inject(model, adapter, base, seed=seed)
    freeze(model, adapter)
    return model, weights


def check_reloaded(directory: Path, engine: Evaluates, batch: Batch, mesh: Mesh, *, averaged: bool, tolerance: float) -> None:
    """Read the bundle `directory` as a user will and compare its losses with those of the trained weights. Collective.

    batch: of this rank. averaged: bundles hold the moving average. tolerance: of the loss, relative; the engine may compute in 16
    bits. TrainingError, on every rank, if the two differ, BundleError if the bundle cannot be read.
    """
    with engine.averaged_weights() if averaged else nullcontext():
        trained = float(engine.evaluate(batch).metrics.sums["nll"])
        (trained,) = mesh.sequence.all_reduce_sums([trained])

    def compare() -> None:
        model = load_bundle(directory, device=mesh.device).model
        plain = WholeModel(TrainModule(model, CrossEntropy(CrossEntropyConfig())), model, mesh.device)
        reloaded = float(plain.evaluate(batch).metrics.sums["nll"])
        if not math.isclose(trained, reloaded, rel_tol=tolerance, abs_tol=tolerance):
            raise TrainingError(
                f"{directory} does not compute what was trained: {batch.num_targets} tokens have a loss of {trained:.6g} in "
                f"training and of {reloaded:.6g} after reloading; do not use it, and report this with its recipe"
            )

    raise_on_all_ranks(mesh.world, TrainingError, f"reading {directory} back", compare)


def _without(keys: Set[str], tree: Any) -> Any:
    """A tree of plain values without these keys at any depth."""
    if isinstance(tree, dict):
        return {key: _without(keys, value) for key, value in tree.items() if key not in keys}
    return tree
