"""Adapters in PEFT's format, read and written without PEFT.

DIR/adapter_config.json         settings
DIR/adapter_model.safetensors   A and B by the names of the modules that they adapt
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.lora import MAGNITUDE, A, merged, target_names, unmatched_keys
from dstrain.checkpoint.adapter_files import open_weights
from dstrain.checkpoint.bundle import find_bundle, save_adapter_bundle
from dstrain.checkpoint.tensor_file import save_tensors
from dstrain.errors import BundleError, ExportError, ImportFormatError
from dstrain.interop.peft.format import (
    config_from_peft,
    config_problems,
    config_to_peft,
    path_problems,
    weights_from_peft,
    weights_to_peft,
)
from dstrain.interop.peft.options import CONFIG_FILE, PEFT_KIND, WEIGHTS_FILE, PeftExport, PeftImport
from dstrain.models.config import ModelConfig
from dstrain.protocols import WeightSource
from dstrain.storage.atomic import atomic_directory, named_if_full, write_file
from dstrain.storage.outputs import check_output_of_kind
from dstrain.storage.parsing import read_tree

_REMEDY = "merge the adapter where it was made, or train it again without"


@dataclass(frozen=True)
class PeftAdapter:
    """weights: by canonical name."""

    config: LoraConfig
    weights: dict[str, Tensor]


def export_peft(options: PeftExport) -> list[str]:
    """Write the uppermost adapter of a bundle; returns lines for people.

    ExportError: the bundle has none, or PEFT cannot represent it. BundleError as `find_bundle`, StorageError as
    `check_output_of_kind`.
    """
    stored = find_bundle(options.bundle, options.base)
    check_output_of_kind(options.output, stored.sources, marker=CONFIG_FILE, kind=PEFT_KIND, overwrite=options.overwrite)
    if not stored.adapters:
        raise ExportError(f"{options.bundle} has no adapter, and PEFT's format holds nothing else; name an adapter bundle")
    adapter = stored.adapters[-1]
    config = adapter.description.adapter
    paths = [name.removesuffix(A) for name in adapter.weights if name.endswith(A)]
    if problems := list(path_problems(stored.description.model, paths, dora=config.dora)):
        raise ExportError(
            f"PEFT cannot represent the adapter of {'; '.join(problems)}; merge it into a plain bundle (`dstrain merge`), or "
            "train it again without this target"
        )
    settings = config_to_peft(config, paths, str(adapter.base))
    with named_if_full(options.output), atomic_directory(options.output.resolve()) as fresh:
        write_file(fresh / CONFIG_FILE, (json.dumps(settings, indent=2) + "\n").encode())
        save_tensors(fresh / WEIGHTS_FILE, weights_to_peft(adapter.weights))
    return [
        f"{options.bundle} -> {options.output}: rank {config.rank}, {len(paths)} modules, for the model of {adapter.base}",
        "modules have the names that they have in the bundle",
    ]


def import_peft(options: PeftImport) -> list[str]:
    """Write an adapter bundle; returns lines for people. Errors as of `read_peft` and `save_adapter_bundle`."""
    stored = find_bundle(options.base)
    adapter = read_peft(options.adapter, stored, stored.description.model)
    save_adapter_bundle(
        options.output,
        adapter=adapter.config,
        base=stored,
        weights=adapter.weights,
        recipe=None,
        notes={"imported_from": "peft", "adapter": str(options.adapter)},
        overwrite=options.overwrite,
    )
    modules = sum(name.endswith(A) for name in adapter.weights)
    return [f"{options.adapter} -> {options.output}: rank {adapter.config.rank}, {modules} modules over {options.base}"]


def read_peft(directory: Path, base: WeightSource, model: ModelConfig) -> PeftAdapter:
    """An adapter of PEFT for the model with the weights `base`.

    ImportFormatError if a file is missing or malformed, a setting has no counterpart here, or the tensors do not fit the base.
    """
    config, file = _read_config(directory / CONFIG_FILE), directory / WEIGHTS_FILE
    if not file.is_file():
        raise ImportFormatError(f"{file} is missing; save the adapter with safe_serialization=True, which writes it")
    if problems := list(config_problems(config)):
        raise ImportFormatError(f"{directory / CONFIG_FILE}: {'; '.join(problems)} has no counterpart here; {_REMEDY}")
    try:
        with open_weights(file) as tensors:
            weights = weights_from_peft({key: tensors.read(key) for key in tensors.infos})
    except KeyError as error:
        raise ImportFormatError(f"{file}: {error} is no part of a low-rank adapter; {_REMEDY}") from None
    except BundleError as error:
        raise ImportFormatError(str(error)) from error
    adapted = {path for path, _, kind in (name.rpartition(".") for name in weights) if kind.startswith("lora_")}
    try:
        settings = config_from_peft(config, target_names(adapted, base.names()))
    except ValueError as error:
        raise ImportFormatError(f"{directory / CONFIG_FILE}: {error}; correct it") from error
    if lost := sorted(unmatched_keys(weights, base.names())):
        known = ", ".join(sorted(name.removesuffix(".weight") for name in base.names() if name.endswith("_proj.weight"))[:3])
        raise ImportFormatError(
            f"{file}: the base has no weights for {', '.join(lost[:4])}; its modules are called {known} and so on: name the base "
            "that the adapter was made for"
        )
    if problems := list(path_problems(model, adapted, dora=settings.dora)):
        raise ImportFormatError(f"{file} adapts {'; '.join(problems)}: another function than here; {_REMEDY}")
    _check_fit(file, base, PeftAdapter(settings, weights), adapted)
    return PeftAdapter(settings, weights)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_tree(path)
    except OSError as error:
        raise ImportFormatError(f"{path}: {error.strerror}; name a directory that PEFT's save_pretrained wrote") from None
    except ValueError as error:
        raise ImportFormatError(f"{path}: not valid JSON: {error}; restore it from a copy") from None
    if not isinstance(config, dict):
        raise ImportFormatError(f"{path}: the settings are no JSON object; restore it from a copy")
    return config


def _check_fit(file: Path, base: WeightSource, adapter: PeftAdapter, adapted: Collection[str]) -> None:
    """ImportFormatError for a tensor that is missing, of another shape, or would be left out."""
    if halves := sorted(path for path in adapted if f"{path}{A}" not in adapter.weights):
        raise ImportFormatError(f"{file}: {halves[0]} has no A; restore the file from a copy")
    if not adapter.config.dora and (extra := [name for name in adapter.weights if name.endswith(MAGNITUDE)]):
        raise ImportFormatError(f"{file}: {extra[0]} is of DoRA, but use_dora is false in {CONFIG_FILE}; correct it")
    for name in base.names():
        if name in adapter.weights or name.removesuffix(".weight") in adapted:
            try:
                merged(name, base.read(name), adapter.weights, adapter.config)
            except BundleError as error:
                raise ImportFormatError(f"{file}: {error}") from error
