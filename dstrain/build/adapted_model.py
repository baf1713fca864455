"""An adapter over a model that is loaded already. The base's tensors are shared, so several adapters cost little more than it.

The adapted modules compute the low-rank product beside the base's in every forward, which merged weights (`load` of an adapter
bundle) do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.lora import inject
from dstrain.build.generation_options import require_adapter_directory
from dstrain.checkpoint.bundle import Bundle, find_bundle
from dstrain.errors import BundleError
from dstrain.interop.peft.adapter import read_peft
from dstrain.interop.peft.options import WEIGHTS_FILE
from dstrain.models.factory import Model, build_model
from dstrain.models.weights import TensorSource, share_canonical, to_canonical
from dstrain.storage.hashing import sha256_of_file, sha256_of_json


def adapted_bundle(base: Bundle, directory: Path) -> Bundle:
    """The base with the adapter in a directory, an adapter bundle trained on it or an adapter of PEFT.

    BundleError: neither, damaged, or the adapter of another base. ImportFormatError: PEFT's, without a counterpart here.
    """
    if require_adapter_directory(directory) == "peft":
        adapter = read_peft(directory, TensorSource(to_canonical(base.model)), base.model_config)
        parts: list[Any] = [base.fingerprint, adapter.config.model_dump(mode="json"), sha256_of_file(directory / WEIGHTS_FILE)]
        return _with(base, directory, adapter.config, adapter.weights, fingerprint=sha256_of_json(parts))
    stored = find_bundle(directory, base.directory)
    uppermost = stored.adapters[-1]
    if not uppermost.base.samefile(base.directory):
        raise BundleError(f"{directory} adapts {uppermost.base}, not {base.directory}; name that one, or merge it first")
    adapted = _with(base, directory, uppermost.description.adapter, uppermost.weights, fingerprint=stored.fingerprint)
    return replace(adapted, task=stored.task, recipe=stored.recipe() or base.recipe, notes=stored.notes)


def _with(base: Bundle, directory: Path, config: LoraConfig, weights: Mapping[str, Tensor], *, fingerprint: str) -> Bundle:
    sources = {**base.sources, f"the adapter {directory}": directory}
    model = _adapted_model(base, config, weights)
    return replace(base, model=model, directory=directory, adapters=base.adapters + 1, fingerprint=fingerprint, sources=sources)


def _adapted_model(base: Bundle, config: LoraConfig, weights: Mapping[str, Tensor]) -> Model:
    shared = to_canonical(base.model)
    like = next(iter(shared.values()))
    model = build_model(base.model_config, base.vocabulary, projections="separate", seed=None)
    inject(model, config, TensorSource(shared), seed=0)
    share_canonical(model, {**shared, **{name: tensor.to(like) for name, tensor in weights.items()}})
    return model.eval()
