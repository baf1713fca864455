"""The options of generating text, and the checks of them that cost nothing: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.arguments import CheckedOptions
from dstrain.checkpoint.directories import require_bundle
from dstrain.checkpoint.saved_recipe import read_recipe
from dstrain.config_base import PrecisionChoice
from dstrain.data.sources.opening import STANDARD
from dstrain.generation.config import generation_config
from dstrain.generation.formats import Format


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(CheckedOptions):
    """The options of `dstrain generate`.

    base: of an adapter bundle, if it has moved. input, output: files, `-` for standard input and output. reference: human
    translations to write beside the answers, or with score_only to score instead. prefix: a file with the beginning of each
    answer. overwrite: replace an output that exists. method: fields of `generation.config`; those left out or None follow the
    bundle's recipe. precision: auto = bf16 on a GPU that has it, else fp32. threads: None for all cores. truncate: cut lines that
    are too long.
    """

    bundle: Path
    base: Path | None = None
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


def check_generation(options: GenerateOptions) -> None:
    """Raise a DstrainError for every mistake in bundle and method that shows before anything is loaded."""
    require_bundle(options.bundle, options.base)
    generation_config((read_recipe(options.bundle) or {}).get("generation"), options.method)
