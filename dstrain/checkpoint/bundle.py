"""A bundle: the model directory that all stages exchange.

    BUNDLE/model.yaml         format, architecture, vocabulary sizes, notes, checksum of the weights, tokenizer fingerprint
    BUNDLE/model.safetensors  weights by canonical name: q, k, v separate, tied matrices once
    BUNDLE/tokenizer/         as in prepared data; absent if the model was made without one
    BUNDLE/recipe.yaml        the recipe that the model was trained by, if any

An adapter bundle holds an adapter instead of a model (adapter_files.py) and is read as its base with the adapter merged.

It is written under a temporary name, and renamed when it is complete and on the disk. Reading checks every byte of the weights,
which costs a pass over the file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from dstrain.adapters.config import AdapterConfig
from dstrain.checkpoint.adapter_files import BaseReference, StoredAdapter, adapters_of, open_weights, write_adapter
from dstrain.checkpoint.directories import MODEL, RECIPE, TOKENIZER, WEIGHTS, check_bundle_output, require_bundle
from dstrain.checkpoint.saved_recipe import read_recipe
from dstrain.checkpoint.task import BundleTask, task_of
from dstrain.checkpoint.tensor_file import FileVersion, TensorFile, file_version, save_tensors
from dstrain.config_base import Config
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers, save_tokenizers
from dstrain.errors import BundleError
from dstrain.models.config import EncoderDecoderConfig, ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.models.weights import TensorSource, check_canonical, load_canonical, parameter_layouts
from dstrain.storage.atomic import atomic_directory, complete_version, read_unreplaced, write_file
from dstrain.storage.document import DocumentFormat, Sha256
from dstrain.storage.hashing import sha256_of_file, sha256_of_json
from dstrain.storage.parsing import dump_yaml

BUNDLE_VERSION = 1


class BundleDescription(Config):
    """What model.yaml holds. sha256: of model.safetensors. tokenizer: fingerprint, None without tokenizers.

    task: None in bundles that were written before they stated it; see `StoredBundle.task`.
    """

    format: int
    model: ModelConfig
    vocabulary: VocabularySizes
    sha256: Sha256
    tokenizer: str | None
    task: BundleTask | None = None
    notes: dict[str, Any] = Field(default_factory=dict)


_REMEDY = "restore it from a copy of the bundle"
DESCRIPTION = DocumentFormat(
    BundleDescription, "description of a model", BundleError, _REMEDY, version_field="format", version=BUNDLE_VERSION
)


@dataclass(frozen=True)
class Bundle:
    """The contents of a bundle directory, ready for use; the model is in evaluation mode, an adapter is merged into it.

    adapters: how many, one over the other. fingerprint, sources: see `StoredBundle`.
    """

    model: Model
    model_config: ModelConfig
    vocabulary: VocabularySizes
    task: BundleTask
    tokenizers: TokenizerPair | None
    recipe: dict[str, Any] | None
    notes: dict[str, Any]
    directory: Path
    adapters: int
    fingerprint: str
    sources: Mapping[str, Path]


def save_bundle(
    directory: Path,
    *,
    model_config: ModelConfig,
    vocabulary: VocabularySizes,
    weights: Mapping[str, Tensor],
    tokenizers: TokenizerPair | None,
    recipe: Mapping[str, Any] | None,
    notes: Mapping[str, Any] | None = None,
    task: BundleTask | None = None,
    overwrite: bool = False,
) -> None:
    """Write a bundle, or replace one with `overwrite`, atomically.

    weights: by canonical name. notes: whatever a reader should know, such as step and score; plain YAML values. task: of a bundle
    that this one is made from; None derives it, see `task_of`. BundleError if the weights do not fit the configuration, the disk
    is full (a bundle that was there before then stays), or `directory` holds anything but a bundle; StorageError if it holds one
    and is not to be overwritten.
    """
    check_canonical(parameter_layouts(build_model(model_config, vocabulary, seed=None)), TensorSource(weights))
    with fresh_directory(directory, overwrite=overwrite) as fresh:
        _, digest = save_tensors(fresh / WEIGHTS, weights, show_progress=True)
        if tokenizers is not None:
            save_tokenizers(tokenizers, fresh / TOKENIZER)
        if recipe is not None:
            write_file(fresh / RECIPE, dump_yaml(dict(recipe)).encode())
        description = BundleDescription(
            format=BUNDLE_VERSION,
            model=model_config,
            vocabulary=vocabulary,
            sha256=digest,
            tokenizer=None if tokenizers is None else tokenizers.fingerprint,
            task=task or task_of(model_config, recipe),
            notes=dict(notes or {}),
        )
        DESCRIPTION.write(fresh / MODEL, description)


def save_adapter_bundle(
    directory: Path,
    *,
    adapter: AdapterConfig,
    base: StoredBundle,
    weights: Mapping[str, Tensor],
    recipe: Mapping[str, Any] | None,
    notes: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Write an adapter bundle, or replace a bundle by one with `overwrite`, atomically, after it has been read back and compared.

    base: of the adapter's training. If its directory was named by a relative path, the reference to it is relative too,
    and both may move together. weights: the trained tensors, by canonical name. BundleError as `save_bundle`.
    """
    with fresh_directory(directory, overwrite=overwrite) as fresh:
        task = base.task if recipe is None else task_of(base.description.model, recipe)
        reference = reference_to(base, directory)
        write_adapter(fresh, config=adapter, base=reference, weights=weights, task=task, notes=notes)
        if recipe is not None:
            write_file(fresh / RECIPE, dump_yaml(dict(recipe)).encode())


def reference_to(base: StoredBundle, directory: Path) -> BaseReference:
    """How an adapter in `directory` refers to its base: by a relative path if the base was named by one."""
    path = base.directory if base.directory.is_absolute() else os.path.relpath(base.directory.resolve(), directory.resolve())
    return BaseReference(path=str(path), fingerprint=base.fingerprint)


@contextmanager
def fresh_directory(directory: Path, *, overwrite: bool) -> Iterator[Path]:
    """`atomic_directory` for a bundle. BundleError or StorageError if it cannot be written, as `check_bundle_output`."""
    check_bundle_output(directory, {}, overwrite=overwrite)
    directory = directory.resolve()
    try:
        with atomic_directory(directory) as fresh:
            yield fresh
    except OSError as error:
        remedy = "free some space, then run the same command again"
        raise BundleError(f"cannot write the bundle {directory}: {error.strerror or error}; {remedy}") from error


@dataclass(frozen=True)
class StoredBundle:
    """A bundle on the disk, verified but for the tokenizer, and the `WeightSource` of its weights with all adapters merged.

    root: the plain bundle that it is or rests on.

    description: of the root. adapters: over it, lowest first. notes: of the bundle itself. fingerprint: which model this is,
    SHA-256 over architecture, vocabulary, weights and adapters. version: of the file of weights that was verified, which is
    read later, tensor by tensor.
    """

    directory: Path
    root: Path
    description: BundleDescription
    adapters: tuple[StoredAdapter, ...]
    notes: dict[str, Any]
    fingerprint: str
    version: FileVersion

    @property
    def task(self) -> BundleTask:
        """The task of the model: that of its uppermost adapter, which was trained last."""
        uppermost = self.adapters[-1].description if self.adapters else self.description
        return uppermost.task or task_of(self.description.model, self.recipe())

    @property
    def sources(self) -> dict[str, Path]:
        """The directories that it is read from, by names for messages; none of them may be written over by what is made of it."""
        bases = (self.root, *(adapter.directory for adapter in self.adapters[:-1])) if self.adapters else ()
        return {f"the bundle {self.directory}": self.directory, **{f"its base {base}": base for base in bases}}

    @cached_property
    def _file(self) -> TensorFile:
        file = open_weights(self.root / WEIGHTS)
        for adapter in self.adapters:
            adapter.check_names(file.infos)
        return file

    def names(self) -> Collection[str]:
        """Of all tensors. BundleError if an adapter has a tensor that belongs to none of them."""
        return self._file.infos.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._file.infos[name].shape

    def read(self, name: str) -> Tensor:
        """One tensor with all adapters merged. BundleError if an adapter does not fit, or the bundle was replaced meanwhile."""
        tensor = None
        with suppress(FileNotFoundError), self._file as file:
            if file.version() == self.version:
                tensor = file.read(name)
        if tensor is None:
            raise BundleError(f"{self.root} was replaced while it was read, perhaps by a training; run the same command again")
        for adapter in self.adapters:
            tensor = adapter.applied(name, tensor)
        return tensor

    def tokenizers(self) -> TokenizerPair | None:
        """The tokenizers, None if the bundle was made without. BundleError if they are not those of the model."""
        return _read_tokenizers(self.root, self.description)

    def recipe(self) -> dict[str, Any] | None:
        """The recipe that the bundle was trained by, if it has one."""
        return read_recipe(self.directory)


def find_bundle(directory: Path, base: Path | None = None) -> StoredBundle:
    """A bundle and, for an adapter bundle, its bases; base: see `adapters_of`.

    BundleError as `load_bundle`, before weights are read.
    """
    return read_unreplaced(lambda: [Path(directory)], lambda paths: _find(paths[0], base))


def _find(directory: Path, base: Path | None) -> StoredBundle:
    directory = complete_version(directory)
    root, adapters = adapters_of(directory, base)
    tree = _description_tree(root)
    description = DESCRIPTION.validate(tree, root / MODEL)
    weights = root / WEIGHTS
    _require(weights)
    version = file_version(weights)
    if sha256_of_file(weights) != description.sha256:
        raise BundleError(f"{weights}: the file was altered after it was written (checksum); restore it from a copy")
    model = [tree["model"], tree["vocabulary"]]  # as they are in the file: defaults of later versions change nothing
    weights_id: str = description.sha256
    for adapter in adapters:
        adapter.check_base(sha256_of_json([*model, weights_id]), weights_id)
        weights_id = adapter.weights_id_on(weights_id)
    notes = adapters[-1].description.notes if adapters else description.notes
    return StoredBundle(directory, root, description, adapters, notes, sha256_of_json([*model, weights_id]), version)


def load_bundle(directory: Path, *, device: torch.device | str = "cpu", base: Path | None = None) -> Bundle:
    """Read and verify a bundle; adapters are merged into their base. base: where that of an adapter bundle is now.

    BundleError: not a bundle directory, a missing or altered file, weights that do not fit, another format version, an adapter
    whose base has moved or changed.
    """
    return read_unreplaced(lambda: [Path(directory)], lambda paths: _load(paths[0], device, base))


def _load(directory: Path, device: torch.device | str, base: Path | None) -> Bundle:
    stored = _find(directory, base)
    description = stored.description
    model = build_model(description.model, description.vocabulary, seed=None)
    try:
        load_canonical(model, stored, device=device)
    except BundleError as error:
        raise BundleError(f"{stored.root / WEIGHTS}: {error}") from error
    return Bundle(
        model=model.eval(),
        model_config=description.model,
        vocabulary=description.vocabulary,
        task=stored.task,
        tokenizers=stored.tokenizers(),
        recipe=stored.recipe(),
        notes=stored.notes,
        directory=stored.directory,
        adapters=len(stored.adapters),
        fingerprint=stored.fingerprint,
        sources=stored.sources,
    )


def _description_tree(directory: Path) -> dict[str, Any]:
    require_bundle(directory)
    return DESCRIPTION.read_tree(directory / MODEL)


def describe_bundle(directory: Path, base: Path | None = None) -> list[str]:
    """A summary of a bundle; base: see `adapters_of`. Raises BundleError if it is not valid."""
    bundle = load_bundle(directory, base=base)
    config, parameters = bundle.model_config, sum(parameter.numel() for parameter in bundle.model.parameters())
    encoder = f"{config.encoder.depth} + " if isinstance(config, EncoderDecoderConfig) else ""
    notes = ", ".join(f"{name} {value}" for name, value in bundle.notes.items()) or "none"
    tokenizer = "none" if bundle.tokenizers is None else bundle.tokenizers.fingerprint[:12]
    description = "none" if bundle.recipe is None else " ".join(str(bundle.recipe.get("description", "")).split()) or "unnamed"
    adapted = [f"adapters: {bundle.adapters}, over {find_bundle(directory, base).root.resolve()}"] if bundle.adapters else []
    return [
        f"bundle: {config.kind}, {parameters:,} parameters, {encoder}{config.decoder.depth} layers, model_dim {config.model_dim}",
        *adapted,
        f"vocabulary: {bundle.vocabulary.source:,} source and {bundle.vocabulary.target:,} target entries; tokenizer {tokenizer}",
        f"recipe: {description}",
        f"notes: {notes}",
        f"fingerprint {bundle.fingerprint[:12]}; the checksum of the weights is right",
    ]


def _read_tokenizers(directory: Path, description: BundleDescription) -> TokenizerPair | None:
    if description.tokenizer is None:
        return None
    _require(directory / TOKENIZER)
    tokenizers = load_tokenizers(directory / TOKENIZER)
    if tokenizers.fingerprint != description.tokenizer:
        raise BundleError(f"{directory / TOKENIZER} is not the tokenizer of this model; restore it from a copy of the bundle")
    return tokenizers


def _require(path: Path) -> None:
    if not path.exists():
        raise BundleError(f"{path} is missing: the bundle is incomplete; restore it from a copy")
