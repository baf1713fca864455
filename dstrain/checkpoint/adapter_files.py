"""The contents of an adapter bundle: the trained tensors, and a reference to their base.

    BUNDLE/adapter/adapter.yaml         format, adapter settings, reference to the base (path, fingerprint), checksum, notes
    BUNDLE/adapter/adapter.safetensors  A, B and trained biases by canonical name
    BUNDLE/recipe.yaml                  the recipe that the adapter was trained by, if any

The base is a bundle, which may be an adapter bundle itself; it is known by its fingerprint (`StoredBundle.fingerprint`). Adapters
that were written before bundles had one fingerprint know the base's weights only, and are still read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from dstrain.adapters.config import AdapterConfig
from dstrain.adapters.lora import merged, unmatched_keys
from dstrain.checkpoint.directories import ADAPTER, ADAPTER_WEIGHTS, ADAPTER_YAML, is_adapter, require_adapter
from dstrain.checkpoint.task import BundleTask
from dstrain.checkpoint.tensor_file import TensorFile, save_tensors
from dstrain.config_base import Config
from dstrain.errors import BundleError, CheckpointError
from dstrain.storage.document import DocumentFormat, Sha256
from dstrain.storage.hashing import sha256_of_file, sha256_of_text

ADAPTER_VERSION = 1


class BaseReference(Config):
    """path: of the base bundle, absolute or from the adapter bundle's directory. fingerprint: which model it is."""

    path: str
    fingerprint: str


class AdapterDescription(Config):
    """What adapter.yaml holds. sha256: of adapter.safetensors. task: None in bundles written before they stated it."""

    format: int
    adapter: AdapterConfig
    base: BaseReference
    sha256: Sha256
    task: BundleTask | None = None
    notes: dict[str, Any] = Field(default_factory=dict)


ADAPTER_FORMAT = DocumentFormat(
    AdapterDescription,
    "description of an adapter",
    BundleError,
    "restore it from a copy",
    version_field="format",
    version=ADAPTER_VERSION,
)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in the bundle `directory`, read and verified. base: the directory of its base, which need not be there."""

    directory: Path
    description: AdapterDescription
    weights: dict[str, Tensor]
    base: Path

    def require_base(self) -> None:
        """BundleError if the base is not where the adapter says."""
        if not self.base.is_dir():
            raise BundleError(
                f"{self.file}: base.path = {self.description.base.path} leads to {self.base}, which is no directory; put the "
                "base bundle there, write its new path into base.path, or name it with --base BUNDLE (to train on this bundle "
                "or learn from it: in `dstrain merge`)"
            )

    @property
    def file(self) -> Path:
        """adapter.yaml."""
        return self.directory / ADAPTER / ADAPTER_YAML

    def check_base(self, base: str, weights_id: str) -> None:
        """BundleError if the adapter was trained on another model than that of fingerprint `base`.

        weights_id: of the base, by which adapters of an earlier version know it.
        """
        expected = self.description.base.fingerprint
        if expected not in (base, weights_id):
            raise BundleError(
                f"{self.file}: base.fingerprint = {expected[:12]}, but {self.base} has {base[:12]}: the adapter "
                "was trained on another base; let base.path or --base name that one"
            )

    def weights_id_on(self, weights_id: str) -> str:
        """The id of the weights of a base together with this adapter."""
        settings = json.dumps(self.description.adapter.model_dump(mode="json"), sort_keys=True)
        return sha256_of_text(f"{weights_id} {self.description.sha256} {settings}")

    def check_names(self, base: Iterable[str]) -> None:
        """BundleError if a tensor of the adapter belongs to none of the base's, given by name."""
        if lost := sorted(unmatched_keys(self.weights, base)):
            raise BundleError(f"{self.directory / ADAPTER / ADAPTER_WEIGHTS}: the base has no weights for {', '.join(lost[:8])}")

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the base with this adapter in it. BundleError names the file if they do not fit."""
        try:
            return merged(name, tensor, self.weights, self.description.adapter)
        except BundleError as error:
            raise BundleError(f"{self.directory / ADAPTER / ADAPTER_WEIGHTS}: {error}") from error


def adapters_of(directory: Path, base: Path | None = None) -> tuple[Path, tuple[StoredAdapter, ...]]:
    """The plain bundle that a bundle rests on, and the adapters over it, lowest first; none if it is plain itself.

    base: read in place of the first base that is not where its adapter says; if all are there, of the one trained on last.
    Whether it is the right one is told by `StoredAdapter.check_base`.
    BundleError if a base is missing, a file is missing or altered, bases go round in a circle, or `base` has no use.
    """
    if base is not None:
        require_adapter(directory, base)
    adapters: list[StoredAdapter] = []
    while is_adapter(directory):
        if any(directory.samefile(above.directory) for above in adapters):
            raise BundleError(f"{adapters[-1].file}: base.path leads back to {directory}; let it name the bundle trained on")
        adapter = read_adapter(directory)
        if base is not None and not adapter.base.is_dir():
            adapter, base = replace(adapter, base=base), None
        adapter.require_base()
        adapters.append(adapter)
        directory = adapter.base
    if base is not None:
        root, below = adapters_of(base)
        return root, (*below, replace(adapters[0], base=base))
    return directory, tuple(reversed(adapters))


def read_adapter(directory: Path) -> StoredAdapter:
    """The adapter in a bundle directory, without its base. BundleError: a file is missing, malformed or altered."""
    weights_path = directory / ADAPTER / ADAPTER_WEIGHTS
    description = ADAPTER_FORMAT.read(directory / ADAPTER / ADAPTER_YAML)
    if not weights_path.is_file():
        raise BundleError(f"{weights_path} is missing: the bundle is incomplete; restore it from a copy")
    if sha256_of_file(weights_path) != description.sha256:
        raise BundleError(f"{weights_path}: the file was altered after it was written (checksum); restore it from a copy")
    with open_weights(weights_path) as file:
        weights = {name: file.read(name) for name in file.infos}
    return StoredAdapter(directory, description, weights, base=directory / description.base.path)


def open_weights(path: Path) -> TensorFile:
    """A file of a bundle's weights. BundleError if it is not a safetensors file."""
    try:
        return TensorFile(path)
    except (OSError, CheckpointError) as error:
        raise BundleError(f"{path}: {error}; restore it from a copy") from error


def write_adapter(
    directory: Path,
    *,
    config: AdapterConfig,
    base: BaseReference,
    weights: Mapping[str, Tensor],
    task: BundleTask,
    notes: Mapping[str, Any],
) -> None:
    """Write an adapter into a bundle directory, read it back and compare. BundleError if the two differ."""
    folder = directory / ADAPTER
    folder.mkdir()
    _, checksum = save_tensors(folder / ADAPTER_WEIGHTS, weights)
    description = AdapterDescription(
        format=ADAPTER_VERSION, adapter=config, base=base, sha256=checksum, task=task, notes=dict(notes)
    )
    ADAPTER_FORMAT.write(folder / ADAPTER_YAML, description)
    stored = read_adapter(directory)
    same = stored.weights.keys() == weights.keys() and all(torch.equal(stored.weights[name], weights[name]) for name in weights)
    if not same or stored.description != description:
        raise BundleError(f"{folder} differs from the data written into it; check the disk and the memory of this machine")
