"""Which directory is a bundle, told by its names alone: nothing is read, and torch is not needed."""

from __future__ import annotations

from pathlib import Path

from dstrain.errors import BundleError
from dstrain.storage.directory_kind import instead_of

MODEL, WEIGHTS, TOKENIZER, RECIPE = "model.yaml", "model.safetensors", "tokenizer", "recipe.yaml"
ADAPTER, ADAPTER_YAML, ADAPTER_WEIGHTS = "adapter", "adapter.yaml", "adapter.safetensors"


def is_bundle(directory: Path) -> bool:
    """Whether a directory is a bundle, plain or with an adapter."""
    return (directory / MODEL).exists() or is_adapter(directory)


def is_adapter(directory: Path) -> bool:
    """Whether a directory is an adapter bundle."""
    return (directory / ADAPTER / ADAPTER_YAML).exists()


def require_bundle(directory: Path) -> None:
    """BundleError unless `is_bundle`."""
    if not is_bundle(directory):
        raise BundleError(f"{directory} is not a bundle: it has no {MODEL}; {instead_of('a bundle', directory)}")
