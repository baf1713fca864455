"""The mean of several bundles: one model that usually translates better than each.

Weights are averaged one tensor at a time straight from the files, in fp64 so that the order of the bundles hardly matters, and
stored in fp32; memory holds the result and one tensor of one bundle, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dstrain.checkpoint.bundle import RECIPE, TOKENIZER, WEIGHTS, BundleDescription, read_description, save_bundle
from dstrain.checkpoint.files import sha256
from dstrain.data.tokenizer import load_tokenizers
from dstrain.errors import BundleError


def average_bundles(directories: Sequence[Path], output: Path) -> None:
    """Write the uniform mean of the bundles to `output`, with the tokenizer and recipe of the last one.

    Raises BundleError where they differ in architecture, vocabulary or tokenizer, or where one is altered.
    """
    if not directories:
        raise BundleError("nothing to average: name at least one bundle")
    descriptions = [read_description(directory) for directory in directories]
    for directory, description in zip(directories[1:], descriptions[1:], strict=True):
        _require_equal(directories[0], descriptions[0], directory, description)
    for directory, description in zip(directories, descriptions, strict=True):
        _verify(directory, description)
    last, newest = directories[-1], descriptions[-1]
    recipe = last / RECIPE
    save_bundle(
        output,
        model_config=newest.model,
        vocabulary=newest.vocabulary,
        weights=average_weights([directory / WEIGHTS for directory in directories]),
        tokenizers=None if newest.tokenizer is None else load_tokenizers(last / TOKENIZER),
        recipe=yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
        notes={"average_of": [str(directory) for directory in directories]},
    )


def average_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """The uniform mean in fp32 of safetensors files with equal names and shapes. Raises BundleError where they differ."""
    with ExitStack() as stack:
        try:
            readers = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        except (OSError, SafetensorError) as error:
            raise BundleError(f"cannot read the weights: {error}; restore the bundle from a copy") from error
        names = sorted(readers[0].keys())
        for file, reader in zip(files, readers, strict=True):
            if different := set(names) ^ set(reader.keys()):
                raise BundleError(f"{file} and {files[0]} hold different tensors: {', '.join(sorted(different)[:5])}")
        return {name: _mean(name, files, readers) for name in names}


def _mean(name: str, files: Sequence[Path], readers: Sequence[Any]) -> Tensor:
    total: Tensor | None = None
    for file, reader in zip(files, readers, strict=True):
        tensor: Tensor = reader.get_tensor(name).to(torch.float64)
        if total is not None and total.shape != tensor.shape:
            raise BundleError(f"{file}: {name} has shape {tuple(tensor.shape)}, in {files[0]} it has {tuple(total.shape)}")
        total = tensor if total is None else total.add_(tensor)
    assert total is not None
    return total.div_(len(files)).to(torch.float32)


def _require_equal(first: Path, one: BundleDescription, second: Path, other: BundleDescription) -> None:
    sides = (one.model.model_dump() | {"vocabulary": one.vocabulary.model_dump()}, other.model.model_dump())
    sides[1]["vocabulary"] = other.vocabulary.model_dump()
    if different := [
        f"{key}: {sides[0].get(key)} and {sides[1].get(key)}" for key in sides[0] if sides[0][key] != sides[1].get(key)
    ]:
        raise BundleError(f"{first} and {second} are different models and cannot be averaged: {'; '.join(different)}")
    if one.tokenizer != other.tokenizer:
        raise BundleError(
            f"{first} and {second} have different tokenizers ({_short(one.tokenizer)} and {_short(other.tokenizer)}): "
            "their weights belong to other words; average bundles of one run"
        )


def _verify(directory: Path, description: BundleDescription) -> None:
    path = directory / WEIGHTS
    if not path.is_file():
        raise BundleError(f"{path} is missing: the bundle is incomplete; restore it from a copy")
    if sha256(path) != description.sha256:
        raise BundleError(f"{path}: the file was altered after it was written (checksum); restore it from a copy")


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "none"
