"""A bundle with a longer context: another configuration, the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dstrain.arguments import CheckedOptions, require_type
from dstrain.checkpoint.bundle import find_bundle, save_bundle
from dstrain.checkpoint.directories import check_bundle_output, require_bundle
from dstrain.errors import ArgumentError, BundleError
from dstrain.models.config import ModelConfig
from dstrain.models.extend import ExtensionKind, check_factor, extended_model
from dstrain.storage.outputs import check_output_path


@dataclass(frozen=True, kw_only=True)
class ExtendOptions(CheckedOptions):
    """The options of `dstrain extend`.

    kind, factor, original_length: see `models.extend.extended_model`. base: of an adapter bundle, if it has moved. overwrite:
    replace a bundle at `output`.
    """

    bundle: Path
    output: Path
    kind: ExtensionKind
    factor: float
    original_length: int | None = None
    base: Path | None = None
    overwrite: bool = False


def extend(options: ExtendOptions) -> ModelConfig:
    """Write the extended bundle, adapters merged, and return its architecture. The recipe goes with it unchanged.

    ArgumentError for an impossible factor, BundleError for a bundle that cannot be read or extended, StorageError if `output`
    exists, without `overwrite`.

    >>> from pathlib import Path
    >>> from dstrain.api import ExtendOptions, extend
    >>> extend(ExtendOptions(bundle=Path("run/bundles/best"), output=Path("longer"), kind="yarn", factor=4)).max_target_length
    4096
    """
    require_type("options", options, ExtendOptions)
    check_factor(options.factor)
    require_bundle(options.bundle, options.base)
    check_bundle_output(options.output, {"BUNDLE": options.bundle}, overwrite=options.overwrite)
    stored = find_bundle(options.bundle, options.base)
    check_output_path(options.output, stored.sources)
    try:
        model = extended_model(
            stored.description.model, kind=options.kind, factor=options.factor, original_length=options.original_length
        )
    except ArgumentError as error:
        raise BundleError(f"{options.bundle}: {error}") from None
    save_bundle(
        options.output,
        model_config=model,
        vocabulary=stored.description.vocabulary,
        weights={name: stored.read(name) for name in stored.names()},
        tokenizers=stored.tokenizers(),
        recipe=stored.recipe(),
        task=stored.task,
        notes={**stored.notes, "extended_from": str(options.bundle)},
        overwrite=options.overwrite,
    )
    return model
