"""dstrain doctor: what dstrain runs with here: versions, devices, threads, and which kernel runs each op.

dstrain doctor                              the kernels of the device and precision that would be used
dstrain doctor --precision bf16 --json      of another precision; plain values

Beside each chosen kernel stand the others with the reason: the device, the dtype or a package that they need, or `on request`:
only a recipe that names them, as engine.kernels.OP, trains with them.
"""

from __future__ import annotations

import argparse
import json
from typing import get_args

from dstrain.config_base import DeviceChoice, PrecisionChoice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--device", choices=get_args(DeviceChoice), default="auto", help="default: cuda if there is one")
    parser.add_argument(
        "--precision", choices=get_args(PrecisionChoice), default="auto", help="default: bf16 on a GPU that has it, else fp32"
    )
    parser.add_argument("--json", action="store_true", help="print plain values")


def run(args: argparse.Namespace) -> int:
    """Look, and print."""
    from dstrain.build.doctor import diagnose

    diagnosis = diagnose(args.device, args.precision)
    print(json.dumps(diagnosis.tree(), indent=2) if args.json else diagnosis)
    return 0
