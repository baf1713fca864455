"""The mean of several bundles: one model that usually translates better than each.

Weights are averaged one tensor at a time straight from the files, in fp64 so that the order of the bundles hardly matters, and
stored in fp32; memory holds the result and one tensor of one bundle, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dstrain.checkpoint.bundle import WEIGHTS, StoredBundle, find_bundle, save_bundle
from dstrain.errors import BundleError

Adapted = Callable[[str, Tensor], Tensor]
"""(portable name, tensor) -> the tensor with adapters merged."""


def average_bundles(directories: Sequence[Path], output: Path) -> None:
    """Write the uniform mean of the bundles to `output`, with the tokenizer and recipe of the last one.

    Of adapter bundles it is the adapted weights that are averaged, so the mean is a plain bundle.

    Raises BundleError where they differ in architecture, vocabulary or tokenizer, or where one is altered.
    """
    if not directories:
        raise BundleError("nothing to average: name at least one bundle")
    bundles = [find_bundle(directory) for directory in directories]
    for bundle in bundles[1:]:
        _require_equal(bundles[0], bundle)
    last = bundles[-1]
    save_bundle(
        output,
        model_config=last.description.model,
        vocabulary=last.description.vocabulary,
        weights=average_weights([bundle.root / WEIGHTS for bundle in bundles], [bundle.adapted for bundle in bundles]),
        tokenizers=last.tokenizers(),
        recipe=last.recipe(),
        notes={"average_of": [str(directory) for directory in directories]},
    )


def average_weights(files: Sequence[Path], adapted: Sequence[Adapted] = ()) -> dict[str, Tensor]:
    """The uniform mean in fp32 of safetensors files with equal names and shapes. Raises BundleError where they differ.

    adapted: for each file what becomes of its tensors before they are averaged; nothing where left out.
    """
    with ExitStack() as stack:
        try:
            readers = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        except (OSError, SafetensorError) as error:
            raise BundleError(f"cannot read the weights: {error}; restore the bundle from a copy") from error
        names = sorted(readers[0].keys())
        for file, reader in zip(files, readers, strict=True):
            if different := set(names) ^ set(reader.keys()):
                raise BundleError(f"{file} and {files[0]} hold different tensors: {', '.join(sorted(different)[:5])}")
        changes = adapted or [_as_it_is] * len(files)
        return {name: _mean(name, files, readers, changes) for name in names}


def _as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _mean(name: str, files: Sequence[Path], readers: Sequence[Any], adapted: Sequence[Adapted]) -> Tensor:
    total: Tensor | None = None
    for file, reader, change in zip(files, readers, adapted, strict=True):
        tensor = change(name, reader.get_tensor(name)).to(torch.float64)
        if total is not None and total.shape != tensor.shape:
            raise BundleError(f"{file}: {name} has shape {tuple(tensor.shape)}, in {files[0]} it has {tuple(total.shape)}")
        total = tensor if total is None else total.add_(tensor)
    assert total is not None
    return total.div_(len(files)).to(torch.float32)


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
