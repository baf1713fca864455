"""Convert a LoRA adapter of PEFT into an adapter bundle over a bundle whose modules it names.

dstrain import peft DIR --base BUNDLE --output ADAPTED

DIR is what PEFT's save_pretrained wrote: adapter_config.json and adapter_model.safetensors. A setting without a counterpart here
is refused by name. To use an adapter without writing a bundle: `dstrain generate BUNDLE --adapter DIR`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.checkpoint.directories import check_bundle_output, require_bundle
from dstrain.cli.common import add_overwrite_argument, named
from dstrain.errors import ImportFormatError
from dstrain.interop.peft.options import CONFIG_FILE, PeftImport, is_peft


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the format."""
    parser.add_argument("adapter", type=Path, metavar="DIR", help=f"directory with {CONFIG_FILE}")
    parser.add_argument("--base", type=Path, metavar="BUNDLE", required=True, help="the bundle that it adapts")
    parser.add_argument("--output", type=Path, required=True, metavar="BUNDLE", help="directory of the adapter bundle")
    add_overwrite_argument(parser, "BUNDLE at --output")


def run(args: argparse.Namespace) -> int:
    """Read, convert, write."""
    if not is_peft(args.adapter):
        raise ImportFormatError(f"{args.adapter} has no {CONFIG_FILE}; name a directory that PEFT's save_pretrained wrote")
    require_bundle(args.base)
    check_bundle_output(args.output, {"DIR": args.adapter, "--base": args.base}, overwrite=args.overwrite)
    from dstrain.interop.peft.adapter import import_peft
    from dstrain.log import logger

    for line in import_peft(PeftImport(**named(args, "adapter", "base", "output", "overwrite"))):
        logger.info(line)
    return 0
