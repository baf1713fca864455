"""dstrain export: a bundle in the format of another program.

    dstrain export BUNDLE --format ctranslate2 --output DIR --quantization int8
    dstrain export ADAPTED --format peft --output DIR

ctranslate2: a directory for CTranslate2's Translator (encoder-decoder) or Generator (decoder-only), with the bundle's tokenizer.
An adapter bundle is merged first. What the format cannot represent is refused, what is written otherwise is printed. At the end
CTranslate2 scores random tokens: without quantization as the bundle does, or nothing is written; else the difference is printed.

peft: the adapter of an adapter bundle as PEFT saves one, under the bundle's module names. The way back is `dstrain import peft`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dstrain.checkpoint.directories import require_bundle
from dstrain.cli.bundle_arguments import add_base_argument
from dstrain.cli.common import add_overwrite_argument, named
from dstrain.errors import ExportError
from dstrain.interop.ctranslate2.options import MODEL_FILE, MODEL_KIND, QUANTIZATIONS, CTranslate2Export
from dstrain.interop.peft.options import CONFIG_FILE, PEFT_KIND, PeftExport
from dstrain.storage.outputs import check_output_of_kind


class ExportFormat(NamedTuple):
    """kind: what is written, in words. marker: a file that it always has. write: does so; gives lines for people."""

    kind: str
    marker: str
    write: Callable[[argparse.Namespace], list[str]]


def _ctranslate2(args: argparse.Namespace) -> list[str]:
    from dstrain.interop.ctranslate2.export import export_ctranslate2

    return export_ctranslate2(CTranslate2Export(**named(args, "bundle", "output", "base", "quantization", "overwrite")))


def _peft(args: argparse.Namespace) -> list[str]:
    if args.quantization is not None:
        raise ExportError(f"--quantization {args.quantization} is for CTranslate2; leave it out beside --format peft")
    from dstrain.interop.peft.adapter import export_peft

    return export_peft(PeftExport(**named(args, "bundle", "output", "base", "overwrite")))


EXPORT_FORMATS = {
    "ctranslate2": ExportFormat(MODEL_KIND, MODEL_FILE, _ctranslate2),
    "peft": ExportFormat(PEFT_KIND, CONFIG_FILE, _peft),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a plain bundle, or one with an adapter")
    add_base_argument(parser)
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="of the output")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="directory to write")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the weights of ctranslate2 (default: float32)")
    add_overwrite_argument(parser, "DIR")


def run(args: argparse.Namespace) -> int:
    """Check, then write."""
    require_bundle(args.bundle, args.base)
    chosen, inputs = EXPORT_FORMATS[args.format], {"BUNDLE": args.bundle, "--base": args.base}
    check_output_of_kind(args.output, inputs, marker=chosen.marker, kind=chosen.kind, overwrite=args.overwrite)
    print("\n".join(chosen.write(args)))
    return 0
