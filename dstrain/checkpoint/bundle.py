"""A bundle: the model directory that all stages exchange.

    BUNDLE/model.yaml         format, architecture, vocabulary sizes, notes, checksum of the weights, tokenizer fingerprint
    BUNDLE/model.safetensors  weights by canonical name: q, k, v separate, tied matrices once
    BUNDLE/tokenizer/         as in prepared data; absent where the model was made without one
    BUNDLE/recipe.yaml        the recipe that the model was trained by, if any

An adapter bundle holds an adapter in the place of a model (adapter_files.py) and is read as its base with the adapter merged.

It is written beside its place and renamed when it is complete and on the disk. Reading checks every byte of the weights, which
costs a pass over the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dstrain.adapters.config import AdapterConfig
from dstrain.checkpoint.adapter_files import (
    BaseReference,
    StoredAdapter,
    adapters_of,
    is_adapter,
    write_adapter,
)
from dstrain.checkpoint.files import replace_directory, sha256, sync
from dstrain.config_base import Config
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers, save_tokenizers
from dstrain.errors import BundleError
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.models.weights import TensorSource, check_canonical, load_canonical, parameter_layouts

FORMAT = 1
MODEL, WEIGHTS, TOKENIZER, RECIPE = "model.yaml", "model.safetensors", "tokenizer", "recipe.yaml"


class BundleDescription(Config):
    """What model.yaml holds. sha256: of model.safetensors. tokenizer: fingerprint, None without tokenizers."""

    format: int
    model: ModelConfig
    vocabulary: VocabularySizes
    sha256: str
    tokenizer: str | None
    notes: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """What a bundle directory holds, ready for use; the model is in evaluation mode, an adapter is merged into it.

    adapters: how many, one over the other.
    """

    model: Model
    model_config: ModelConfig
    vocabulary: VocabularySizes
    tokenizers: TokenizerPair | None
    recipe: dict[str, Any] | None
    notes: dict[str, Any]
    directory: Path
    adapters: int


def save_bundle(
    directory: Path,
    *,
    model_config: ModelConfig,
    vocabulary: VocabularySizes,
    weights: Mapping[str, Tensor],
    tokenizers: TokenizerPair | None,
    recipe: Mapping[str, Any] | None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a bundle, or replace one, atomically.

    weights: by canonical name. notes: whatever a reader should know, such as step and score; plain YAML values. BundleError if
    the weights do not fit the configuration, the disk is full (a bundle that was there before then stays), or `directory` holds
    anything but a bundle.
    """
    check_canonical(parameter_layouts(build_model(model_config, vocabulary, seed=None)), TensorSource(weights))
    with fresh_directory(directory) as fresh:
        save_file({name: _own_memory(tensor) for name, tensor in weights.items()}, fresh / WEIGHTS)
        if tokenizers is not None:
            save_tokenizers(tokenizers, fresh / TOKENIZER)
        if recipe is not None:
            _write_yaml(fresh / RECIPE, dict(recipe))
        description = BundleDescription(
            format=FORMAT,
            model=model_config,
            vocabulary=vocabulary,
            sha256=sha256(fresh / WEIGHTS),
            tokenizer=None if tokenizers is None else tokenizers.fingerprint,
            notes=dict(notes or {}),
        )
        _write_yaml(fresh / MODEL, description.model_dump(mode="json"))


def save_adapter_bundle(
    directory: Path,
    *,
    adapter: AdapterConfig,
    base: StoredBundle,
    weights: Mapping[str, Tensor],
    recipe: Mapping[str, Any] | None,
    notes: Mapping[str, Any],
) -> None:
    """Write an adapter bundle, or replace a bundle by one, atomically, after what was written has been read back and compared.

    base: what the adapter was trained on. Where its directory was named by a relative path, the reference to it is relative too,
    and both may move together. weights: what was trained, by canonical name. BundleError as `save_bundle`.
    """
    path = base.directory if base.directory.is_absolute() else os.path.relpath(base.directory.resolve(), directory.resolve())
    with fresh_directory(directory) as fresh:
        reference = BaseReference(path=str(path), fingerprint=base.fingerprint)
        write_adapter(fresh, config=adapter, base=reference, weights=weights, notes=notes)
        if recipe is not None:
            _write_yaml(fresh / RECIPE, dict(recipe))


@contextmanager
def fresh_directory(directory: Path) -> Iterator[Path]:
    """An empty directory to write a bundle into, which is on the disk and in the place of `directory` after the context."""
    directory = directory.resolve()
    _refuse_to_replace_others(directory)
    fresh = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        replace_directory(fresh, directory)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot write the bundle {directory}: {error}; free some space or choose another --output") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@dataclass(frozen=True)
class StoredBundle:
    """A bundle on the disk, verified but for the tokenizer, and the `WeightSource` of its weights with all adapters merged.

    root: the plain bundle that it is or rests on.

    description: of the root. adapters: over it, lowest first. notes: of the bundle itself. fingerprint: stands for the weights,
    adapters included; see adapter_files.py.
    """

    directory: Path
    root: Path
    description: BundleDescription
    adapters: tuple[StoredAdapter, ...]
    notes: dict[str, Any]
    fingerprint: str

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        with self._open() as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for adapter in self.adapters:
            adapter.check_names(shapes)
        return shapes

    def names(self) -> Collection[str]:
        """Of all tensors. BundleError if an adapter has a tensor that belongs to none of them."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor with all adapters merged. BundleError if an adapter does not fit.

        The file is opened for each tensor: it is mapped into memory, and pages that were read count until it is closed.
        """
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)
        for adapter in self.adapters:
            tensor = adapter.applied(name, tensor)
        return tensor

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.root / WEIGHTS, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{self.root / WEIGHTS}: {error}; restore it from a copy") from error

    def tokenizers(self) -> TokenizerPair | None:
        """The tokenizers, None where the bundle was made without. BundleError where they are not those of the model."""
        return _read_tokenizers(self.root, self.description)

    def recipe(self) -> dict[str, Any] | None:
        """The recipe that the bundle was trained by, if it has one."""
        path = self.directory / RECIPE
        return _read_yaml(path) if path.exists() else None


def find_bundle(directory: Path) -> StoredBundle:
    """A bundle and, for an adapter bundle, what it rests on. BundleError as `load_bundle`, before weights are read."""
    directory = _whole(Path(directory))
    root, adapters = adapters_of(directory)
    description = read_description(root)
    weights = root / WEIGHTS
    _require(weights)
    if sha256(weights) != description.sha256:
        raise BundleError(f"{weights}: the file was altered after it was written (checksum); restore it from a copy")
    fingerprint = description.sha256
    for adapter in adapters:
        fingerprint = adapter.fingerprint_on(fingerprint)
    notes = adapters[-1].description.notes if adapters else description.notes
    return StoredBundle(directory, root, description, adapters, notes, fingerprint)


def load_bundle(directory: Path, *, device: torch.device | str = "cpu") -> Bundle:
    """Read and verify a bundle; adapters are merged into their base.

    BundleError: not a bundle directory, a missing or altered file, weights that do not fit, another format version, an adapter
    whose base is not where it was or not what it was.
    """
    stored = find_bundle(directory)
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
        tokenizers=stored.tokenizers(),
        recipe=stored.recipe(),
        notes=stored.notes,
        directory=stored.directory,
        adapters=len(stored.adapters),
    )


def read_description(directory: Path) -> BundleDescription:
    """model.yaml alone, without the weights. BundleError if it is missing, malformed or of another format."""
    path = directory / MODEL
    if not path.is_file():
        raise BundleError(f"{directory} is not a bundle: it has no {MODEL}; name a directory that training or import has written")
    content = _read_yaml(path)
    if content.get("format") != FORMAT:
        raise BundleError(
            f"{path}: format {content.get('format')!r}, this dstrain reads {FORMAT}; use the dstrain version that wrote it"
        )
    try:
        return TypeAdapter(BundleDescription).validate_python(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise BundleError(f"{path} does not describe a model: {problems}; restore the file from a copy") from error


def is_bundle(directory: Path) -> bool:
    """Whether a directory is a bundle, plain or with an adapter."""
    return (directory / MODEL).is_file() or is_adapter(directory)


def bundle_fingerprint(directory: Path) -> str:
    """SHA-256 over architecture, vocabulary and all weights, adapters included: which model this is."""
    stored = find_bundle(directory)
    content = _read_yaml(stored.root / MODEL)
    facts = json.dumps([content["model"], content["vocabulary"], stored.fingerprint], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def _refuse_to_replace_others(directory: Path) -> None:
    if directory.is_dir() and (is_bundle(directory) or not any(directory.iterdir())):
        return
    if directory.exists():
        raise BundleError(f"{directory} exists and is not a bundle, so it is not replaced; choose another place")


def _whole(directory: Path) -> Path:
    """The directory, or the one it was about to replace where a kill came between two renames."""
    previous = directory.with_name(f".{directory.name}.old")
    return previous if previous.is_dir() and not directory.exists() else directory


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


def _own_memory(tensor: Tensor) -> Tensor:
    """A tensor that safetensors can write: contiguous, sharing memory with no other."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BundleError(f"{path} cannot be read: {error}; restore it from a copy") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds no mapping; restore it from a copy")
    return content
