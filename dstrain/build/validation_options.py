"""The options of a validation, and the checks of them that cost nothing: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.arguments import CheckedOptions
from dstrain.checkpoint.directories import require_bundle
from dstrain.checkpoint.saved_recipe import read_recipe
from dstrain.config_base import BleuTokenization, DeviceChoice, PrecisionChoice, RougeWords
from dstrain.data.prepared.location import DataDirectory
from dstrain.data.prepared.manifest import load_manifest
from dstrain.errors import ArgumentError
from dstrain.evaluation.metrics.rouge import build_rouge
from dstrain.evaluation.metrics.tokenization import check_tokenization
from dstrain.generation.config import GenerationConfig, generation_config
from dstrain.recipe import Recipe
from dstrain.recipe_file import check_recipe


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(CheckedOptions):
    """The options of `dstrain validate`.

    base: of an adapter bundle, if it has moved. generate: translate, too; None = if the split has sources and raw text of its
    targets. method: fields of `generation.config`; those left out or None follow the recipe's `validation`, as do tokenize and
    lowercase of BLEU and the words of ROUGE. max_tokens: padded tokens of a batch. precision: auto = bf16 on a GPU that has it,
    else fp32.
    """

    bundle: Path
    data: DataDirectory
    base: Path | None = None
    split: str = "valid"
    generate: bool | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    tokenize: BleuTokenization | None = None
    lowercase: bool | None = None
    rouge: RougeWords | None = None
    max_tokens: int = 4096
    device: DeviceChoice = "auto"
    precision: PrecisionChoice = "auto"


def check_validation(options: ValidateOptions) -> None:
    """Raise a DstrainError for every mistake in arguments and paths that shows before anything is loaded."""
    requested = {
        **options.method,
        "tokenize": options.tokenize,
        "lowercase": options.lowercase,
        "rouge": options.rouge,
    }
    unused = [name for name, value in requested.items() if value is not None]
    if unused and options.generate is False:
        raise ArgumentError(f"{unused[0]} is about translations, and generate = False (--no-generate) makes none; leave one out")
    if options.tokenize is not None:
        check_tokenization(options.tokenize)
    if options.rouge is not None:
        build_rouge(options.rouge)
    require_bundle(options.bundle, options.base)
    load_manifest(options.data).require_split(options.split, options.data)
    generation_of(checked_recipe(read_recipe(options.bundle)), options)


def checked_recipe(tree: Mapping[str, Any] | None) -> Recipe | None:
    """The recipe of a bundle, if it has one. RecipeError if it is none of this version."""
    return check_recipe(tree, "the bundle's recipe") if tree else None


def generation_of(recipe: Recipe | None, options: ValidateOptions) -> GenerationConfig | None:
    """How the split is translated: as training translates the valid split, or by `generation` if it translates none.

    None = only losses.
    """
    if options.generate is False:
        return None
    section = None if recipe is None else (recipe.validation.generation or recipe.generation).model_dump()
    return generation_config(section, options.method)
