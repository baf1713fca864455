"""Imported checkpoints as bundles; one with an adapter becomes an adapter bundle that has its base inside.

OUTPUT/              a plain bundle, or an adapter bundle whose base.path is `base`
OUTPUT/base/         the plain bundle that the adapter was trained on
OUTPUT/recipe.yaml   what the checkpoint's settings say of its training
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.checkpoint.adapter_files import BaseReference, write_adapter
from dstrain.checkpoint.bundle import find_bundle, fresh_directory, save_bundle
from dstrain.checkpoint.directories import RECIPE
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.data.tokenizers.unknown import unreachable_tags
from dstrain.interop.fairseq.lora import ForeignAdapter
from dstrain.log import logger
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.storage.atomic import write_file
from dstrain.storage.parsing import dump_yaml

BASE = "base"


def save_imported(
    directory: Path,
    *,
    model_config: ModelConfig,
    vocabulary: VocabularySizes,
    weights: Mapping[str, Tensor],
    adapter: ForeignAdapter | None,
    tokenizers: TokenizerPair | None,
    recipe: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Write an imported model, atomically. BundleError as `save_bundle`, and if the adapter does not fit."""
    lost = [] if tokenizers is None else unreachable_tags(tokenizers.source)
    if lost:
        logger.warning(
            "the SentencePiece model splits %d tags of the source dictionary (%s): if your text begins with them, name them with "
            "--language-tags",
            len(lost),
            ", ".join(lost[:5]),
        )

    def save(bundle: Path, recipe: Mapping[str, Any] | None) -> None:
        save_bundle(
            bundle,
            model_config=model_config,
            vocabulary=vocabulary,
            weights=weights,
            tokenizers=tokenizers,
            recipe=recipe,
            notes=notes,
            overwrite=overwrite,
        )

    if adapter is None:
        save(directory, recipe)
        return
    with fresh_directory(directory, overwrite=overwrite) as fresh:
        save(fresh / BASE, None)
        if recipe is not None:
            write_file(fresh / RECIPE, dump_yaml(dict(recipe)).encode())
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
