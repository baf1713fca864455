"""Adapted small models for the tests of this package."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject, merged
from dstrain.batch import Sequences
from dstrain.checkpoint.bundle import find_bundle, save_adapter_bundle
from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.models.factory import Model, build_model
from dstrain.models.weights import TensorSource, load_canonical, to_canonical
from tests.batches import decoder_hidden
from tests.unit.models.build import sequences, small_config, small_model

SOURCE, TARGET = sequences(5, 3, 1), sequences(4, 6, 1, seed=2)


def lora(*targets: str, **changes: Any) -> LoraConfig:
    """Rank 3, alpha 5, unless changed."""
    return LoraConfig(**{"rank": 3, "alpha": 5, "targets": targets, **changes})


def adapted(
    adapter: LoraConfig, config: EncoderDecoderConfig | DecoderOnlyConfig | None = None, *, trained: bool = True, seed: int = 1
) -> Model:
    """A small model in evaluation mode with adapters that are as after some training, or fresh."""
    model = small_model(config or small_config(), projections="separate")
    load_canonical(model, inject(model, adapter, TensorSource(to_canonical(model)), seed=seed))
    freeze(model, adapter)
    if trained:
        train(model)
    return model.eval()


def train(model: Model) -> None:
    """Move every trained parameter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@torch.no_grad()
def logits(model: Model, source: Sequences = SOURCE, target: Sequences = TARGET) -> Tensor:
    """Of all real target positions."""
    found: Tensor = model.project(decoder_hidden(model, source, target))[target.tokens != 1]
    return found


def copies(model: Model) -> dict[str, Tensor]:
    """Its weights by canonical name, as they are now."""
    return {name: tensor.clone() for name, tensor in to_canonical(model).items()}


def adapter_of(model: Model) -> dict[str, Tensor]:
    """What was trained, by canonical name."""
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in to_canonical(model).items() if tensor.data_ptr() in trained}


def merged_model(model: Model, adapter: LoraConfig, config: EncoderDecoderConfig | DecoderOnlyConfig | None = None) -> Model:
    """A plain model with the base's weights, changed as `merged` says."""
    plain = small_model(config or small_config())
    base, trained = copies(plain), adapter_of(model)
    load_canonical(plain, TensorSource({name: merged(name, tensor, trained, adapter) for name, tensor in base.items()}))
    return plain


ADAPTED = ("q_proj", "up_proj")
"""Targets of `adapt`."""


def adapt(directory: Path, base: Path, *, seed: int) -> Path:
    """An adapter bundle over a bundle, as after some training. seed: of it, and the beam size of its recipe."""
    stored, config = find_bundle(base), LoraConfig(rank=2, alpha=9, targets=ADAPTED)
    model = build_model(stored.description.model, stored.description.vocabulary, projections="separate", seed=None)
    load_canonical(model, inject(model, config, stored, seed=seed))
    freeze(model, config)
    train(model)
    recipe = {"version": 1, "generation": {"kind": "beam", "beam_size": seed}}
    save_adapter_bundle(directory, adapter=config, base=stored, weights=adapter_of(model), recipe=recipe, notes={"step": seed})
    return directory
