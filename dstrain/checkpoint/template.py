"""What all bundles of a run share: everything but weights and notes.

Every checkpoint holds a copy, a bundle without weights, so that `dstrain consolidate` needs nothing but the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.adapters.config import AdapterConfig
from dstrain.checkpoint.adapter_files import ADAPTER_FORMAT, ADAPTER_VERSION, AdapterDescription
from dstrain.checkpoint.bundle import (
    BUNDLE_VERSION,
    DESCRIPTION,
    BundleDescription,
    StoredBundle,
    reference_to,
    save_adapter_bundle,
    save_bundle,
)
from dstrain.checkpoint.directories import ADAPTER, ADAPTER_YAML, MODEL, RECIPE, TOKENIZER
from dstrain.checkpoint.task import task_of
from dstrain.data.tokenizers.tokenizer import TokenizerPair, save_tokenizers
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.storage.atomic import write_file
from dstrain.storage.parsing import dump_yaml

NO_WEIGHTS = "0" * 64
"""Stands for the SHA-256 of weights that are not there."""


@dataclass(frozen=True)
class BundleTemplate:
    """adapter, base: of a run that trains an adapter; its bundles are adapter bundles."""

    model_config: ModelConfig
    vocabulary: VocabularySizes
    tokenizers: TokenizerPair
    recipe: Mapping[str, Any]
    adapter: tuple[AdapterConfig, StoredBundle] | None

    def save(self, directory: Path, weights: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write a bundle. weights: the trained tensors, by canonical name. BundleError as `save_bundle`."""
        if self.adapter is not None:
            config, base = self.adapter
            save_adapter_bundle(directory, adapter=config, base=base, weights=weights, recipe=self.recipe, notes=notes)
            return
        save_bundle(
            directory,
            model_config=self.model_config,
            vocabulary=self.vocabulary,
            weights=weights,
            tokenizers=self.tokenizers,
            recipe=self.recipe,
            notes=notes,
        )

    def write(self, directory: Path) -> None:
        """Write the bundle without weights and notes into an empty directory."""
        write_file(directory / RECIPE, dump_yaml(dict(self.recipe)).encode())
        if self.adapter is not None:
            config, base = self.adapter
            reference, task = reference_to(base, directory), task_of(base.description.model, self.recipe)
            (directory / ADAPTER).mkdir()
            adapter = AdapterDescription(format=ADAPTER_VERSION, adapter=config, base=reference, sha256=NO_WEIGHTS, task=task)
            ADAPTER_FORMAT.write(directory / ADAPTER / ADAPTER_YAML, adapter)
            return
        save_tokenizers(self.tokenizers, directory / TOKENIZER)
        description = BundleDescription(
            format=BUNDLE_VERSION,
            model=self.model_config,
            vocabulary=self.vocabulary,
            sha256=NO_WEIGHTS,
            tokenizer=self.tokenizers.fingerprint,
            task=task_of(self.model_config, self.recipe),
        )
        DESCRIPTION.write(directory / MODEL, description)
