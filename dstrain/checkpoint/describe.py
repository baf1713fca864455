"""A bundle in words, after its checksums were compared."""

from __future__ import annotations

from pathlib import Path

from dstrain.checkpoint.bundle import find_bundle, load_bundle
from dstrain.models.config import EncoderDecoderConfig


def describe_bundle(directory: Path) -> list[str]:
    """A summary of a bundle. Raises BundleError if it is not valid."""
    bundle = load_bundle(directory)
    config, parameters = bundle.model_config, sum(parameter.numel() for parameter in bundle.model.parameters())
    encoder = f"{config.encoder.depth} + " if isinstance(config, EncoderDecoderConfig) else ""
    notes = ", ".join(f"{name} {value}" for name, value in bundle.notes.items()) or "none"
    tokenizer = "none" if bundle.tokenizers is None else bundle.tokenizers.fingerprint[:12]
    description = "none" if bundle.recipe is None else " ".join(str(bundle.recipe.get("description", "")).split()) or "unnamed"
    adapted = [f"adapters: {bundle.adapters}, over {find_bundle(directory).root.resolve()}"] if bundle.adapters else []
    return [
        f"bundle: {config.kind}, {parameters:,} parameters, {encoder}{config.decoder.depth} layers, model_dim {config.model_dim}",
        *adapted,
        f"vocabulary: {bundle.vocabulary.source:,} source and {bundle.vocabulary.target:,} target entries; tokenizer {tokenizer}",
        f"recipe: {description}",
        f"notes: {notes}",
        f"fingerprint {bundle.fingerprint[:12]}; the checksum of the weights is right",
    ]
