"""Imported checkpoints as bundles; one with an adapter becomes an adapter bundle that has its base inside.

OUTPUT/              a plain bundle, or an adapter bundle whose base.path is `base`
OUTPUT/base/         the plain bundle that the adapter was trained on
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.checkpoint.adapter_files import BaseReference, write_adapter
from dstrain.checkpoint.bundle import find_bundle, fresh_directory, save_bundle
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.interop.fairseq.lora import ForeignAdapter
from dstrain.models.config import ModelConfig, VocabularySizes

BASE = "base"


def save_imported(
    directory: Path,
    *,
    model_config: ModelConfig,
    vocabulary: VocabularySizes,
    weights: Mapping[str, Tensor],
    adapter: ForeignAdapter | None,
    tokenizers: TokenizerPair | None,
    notes: Mapping[str, Any],
) -> None:
    """Write an imported model, atomically. BundleError as `save_bundle`, and if the adapter does not fit."""

    def save(bundle: Path) -> None:
        save_bundle(
            bundle,
            model_config=model_config,
            vocabulary=vocabulary,
            weights=weights,
            tokenizers=tokenizers,
            recipe=None,
            notes=notes,
        )

    if adapter is None:
        save(directory)
        return
    with fresh_directory(directory) as fresh:
        save(fresh / BASE)
        base = find_bundle(fresh / BASE)
        write_adapter(
            fresh,
            config=LoraConfig(**adapter.settings),
            base=BaseReference(path=BASE, fingerprint=base.fingerprint),
            weights=adapter.weights,
            task=base.task,
            notes=notes,
        )
        stored = find_bundle(fresh)
        for name in stored.names():
            stored.read(name)  # BundleError if the adapter does not fit
