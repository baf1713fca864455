"""The options of generating text, and the checks of them that cost nothing: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dstrain.arguments import CheckedOptions
from dstrain.checkpoint.directories import is_adapter, require_bundle
from dstrain.checkpoint.saved_recipe import read_recipe
from dstrain.config_base import PrecisionChoice
from dstrain.data.sources.opening import STANDARD
from dstrain.errors import BundleError
from dstrain.generation.config import generation_config
from dstrain.generation.formats import Format
from dstrain.interop.peft.options import CONFIG_FILE, is_peft
from dstrain.storage.atomic import complete_version


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(CheckedOptions):
    """The options of `dstrain generate`.

    base: of an adapter bundle, if it has moved. adapter: over `bundle`, an adapter bundle or a directory of PEFT. direction: of a
    multilingual bundle, names its tags and start token. input, output: files, `-` for standard input and output. reference: human
    translations to write beside the answers, or with score_only to score instead. prefix: a file with the beginning of each
    answer. overwrite: replace an output that exists. method: fields of `generation.config`; those left out or None follow the
    bundle's recipe. precision: auto = bf16 on a GPU that has it, else fp32. threads: None for all cores. truncate: cut lines that
    are too long.
    """

    bundle: Path
    base: Path | None = None
    adapter: Path | None = None
    direction: str | None = None
    input: str = STANDARD
    output: str = STANDARD
    reference: str | None = None
    prefix: str | None = None
    score_only: bool = False
    overwrite: bool = False
    method: Mapping[str, Any] = field(default_factory=dict)
    format: Format = "text"
    truncate: bool = False
    device: str = "auto"
    precision: PrecisionChoice = "auto"
    threads: int | None = None


def require_adapter_directory(directory: Path) -> Literal["bundle", "peft"]:
    """Which kind of adapter it is. BundleError if it is none."""
    if is_peft(directory):
        return "peft"
    if is_adapter(complete_version(directory)):
        return "bundle"
    raise BundleError(
        f"{directory} is no adapter: it is no adapter bundle and has no {CONFIG_FILE} of PEFT; name a bundle of a training with "
        "an adapter section, or what PEFT's save_pretrained wrote"
    )


def check_generation(options: GenerateOptions) -> None:
    """Raise a DstrainError for every mistake in bundle and method that shows before anything is loaded."""
    require_bundle(options.bundle, options.base)
    recipe = read_recipe(options.bundle)
    if options.adapter is not None and require_adapter_directory(options.adapter) == "bundle":
        recipe = read_recipe(options.adapter) or recipe
    generation_config((recipe or {}).get("generation"), options.method)
