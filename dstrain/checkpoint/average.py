"""The mean of several bundles: one model that usually translates better than each.

Weights are averaged one tensor at a time straight from the files, in fp64 so that the order of the bundles hardly matters, and
stored in fp32; memory holds the result and one tensor of one bundle, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.checkpoint.bundle import StoredBundle, find_bundle, save_bundle
from dstrain.checkpoint.directories import is_adapter
from dstrain.errors import BundleError
from dstrain.progress import with_progress
from dstrain.protocols import WeightSource
from dstrain.storage.atomic import read_unreplaced
from dstrain.storage.outputs import check_output_path


def average_bundles(
    choose: Callable[[], Sequence[Path]], output: Path, base: Path | None = None, *, overwrite: bool = False
) -> Sequence[Path]:
    """Write the uniform mean of bundles to `output`, with the tokenizer and recipe of the last one; returns the bundles.

    choose: their directories; it is called again if a training replaces or removes one while they are read.
    Of adapter bundles it is the adapted weights that are averaged, so the mean is a plain bundle. base: where their base is now.

    Raises BundleError if they differ in architecture, vocabulary or tokenizer, or if one is altered; StorageError if `output` is
    one of them or a base, or holds a bundle, without `overwrite`.
    """
    directories, mean = read_unreplaced(choose, partial(_read_mean, output=output, base=base))
    save_bundle(output, **mean, notes={"average_of": [str(directory) for directory in directories]}, overwrite=overwrite)
    return directories


def _read_mean(directories: Sequence[Path], *, output: Path, base: Path | None) -> tuple[Sequence[Path], dict[str, Any]]:
    """The bundles and what `save_bundle` needs of their mean."""
    if not directories:
        raise BundleError("nothing to average: name at least one bundle")
    adapted = [is_adapter(directory) for directory in directories]
    bases = [base if is_one or not any(adapted) else None for is_one in adapted]
    bundles = [find_bundle(directory, of_it) for directory, of_it in zip(directories, bases, strict=True)]
    check_output_path(output, {name: path for bundle in bundles for name, path in bundle.sources.items()})
    for bundle in bundles[1:]:
        _require_equal(bundles[0], bundle)
    last = bundles[-1]
    return directories, {
        "model_config": last.description.model,
        "vocabulary": last.description.vocabulary,
        "weights": average_weights([(str(bundle.directory), bundle) for bundle in bundles]),
        "tokenizers": last.tokenizers(),
        "recipe": last.recipe(),
        "task": last.task,
    }


def average_weights(sources: Sequence[tuple[str, WeightSource]]) -> dict[str, Tensor]:
    """The uniform mean in fp32 of named sources with equal tensor names and shapes. Raises BundleError if they differ."""
    first, reference = sources[0]
    for name, source in sources:
        if different := set(reference.names()) ^ set(source.names()):
            raise BundleError(f"{name} and {first} hold different tensors: {', '.join(sorted(different)[:5])}")
        for key in reference.names():
            if source.shape(key) != reference.shape(key):
                raise BundleError(f"{name}: {key} has shape {source.shape(key)}, in {first} it has {reference.shape(key)}")
    return {
        key: _mean(key, [source for _, source in sources])
        for key in with_progress(sorted(reference.names()), "averaging", "tensors")
    }


def _mean(key: str, sources: Sequence[WeightSource]) -> Tensor:
    total = torch.zeros(sources[0].shape(key), dtype=torch.float64)
    for source in sources:
        total.add_(source.read(key))
    return total.div_(len(sources)).to(torch.float32)


def _require_equal(first: StoredBundle, second: StoredBundle) -> None:
    one, other = first.description, second.description
    sides = [{**side.model.model_dump(), "vocabulary": side.vocabulary.model_dump()} for side in (one, other)]
    if different := [
        f"{key}: {sides[0].get(key)} and {sides[1].get(key)}" for key in sides[0] if sides[0][key] != sides[1].get(key)
    ]:
        names = f"{first.directory} and {second.directory}"
        raise BundleError(f"{names} are different models and cannot be averaged: {'; '.join(different)}")
    if one.tokenizer != other.tokenizer:
        raise BundleError(
            f"{first.directory} and {second.directory} have different tokenizers ({_short(one.tokenizer)} and "
            f"{_short(other.tokenizer)}): their weights belong to other words; average bundles of one run"
        )


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "none"
