"""A bundle: the portable model directory that all stages exchange.

    BUNDLE/model.yaml         format, architecture, vocabulary sizes, notes, checksum of the weights, tokenizer fingerprint
    BUNDLE/model.safetensors  weights by portable name: q, k, v separate, tied matrices once
    BUNDLE/tokenizer/         as in prepared data; absent where the model was made without one
    BUNDLE/recipe.yaml        the recipe that the model was trained by, if any

It is written beside its place and renamed when it is complete and on the disk. Reading checks every byte of the weights, which
costs a pass over the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dstrain.checkpoint.files import replace_directory, sha256, sync
from dstrain.data.tokenizer import TokenizerPair, load_tokenizers, save_tokenizers
from dstrain.errors import BundleError
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.models.portable import check_portable, load_portable
from dstrain.strict import Config

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
    """What a bundle directory holds, ready for use; the model is in evaluation mode."""

    model: Model
    model_config: ModelConfig
    vocabulary: VocabularySizes
    tokenizers: TokenizerPair | None
    recipe: dict[str, Any] | None
    notes: dict[str, Any]
    directory: Path


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

    weights: by portable name. notes: whatever a reader should know, such as step and score; plain YAML values. BundleError if
    the weights do not fit the configuration, the disk is full (a bundle that was there before then stays), or `directory` holds
    anything but a bundle.
    """
    directory = directory.resolve()
    _refuse_to_replace_others(directory)
    with torch.device("meta"):
        check_portable(build_model(model_config, vocabulary, seed=None), weights)
    fresh = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
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
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        replace_directory(fresh, directory)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot write the bundle {directory}: {error}; free some space or choose another --output") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load_bundle(directory: Path, *, device: torch.device | str = "cpu") -> Bundle:
    """Read and verify a bundle.

    BundleError: not a bundle directory, a missing or altered file, weights that do not fit, another format version.
    """
    directory = _whole(Path(directory))
    description = read_description(directory)
    weights_path = directory / WEIGHTS
    _require(weights_path)
    if sha256(weights_path) != description.sha256:
        raise BundleError(f"{weights_path}: the file was altered after it was written (checksum); restore it from a copy")
    model = build_model(description.model, description.vocabulary, seed=None)
    try:
        load_portable(model, load_file(weights_path))
    except (BundleError, SafetensorError) as error:
        raise BundleError(f"{weights_path}: {error}") from error
    return Bundle(
        model=model.to(device).eval(),
        model_config=description.model,
        vocabulary=description.vocabulary,
        tokenizers=_read_tokenizers(directory, description),
        recipe=_read_yaml(directory / RECIPE) if (directory / RECIPE).exists() else None,
        notes=description.notes,
        directory=directory,
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


def _refuse_to_replace_others(directory: Path) -> None:
    if directory.is_dir() and ((directory / MODEL).is_file() or not any(directory.iterdir())):
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
