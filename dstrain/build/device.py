"""The device and the precision that a user names."""

from __future__ import annotations

from typing import get_args

import torch

from dstrain.arguments import check_device_name
from dstrain.config_base import Precision, PrecisionChoice
from dstrain.errors import ArgumentError
from dstrain.ops.allocator import keep_freed_memory


def usable_device(name: str | torch.device) -> str:
    """The device of that name here; `auto` is a GPU if there is one. Raises ArgumentError if there is no such device."""
    name = check_device_name(str(name))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise ArgumentError(f"device {name}: no GPU is visible here; use cpu or auto")
    if int(name.partition(":")[2] or 0) >= torch.cuda.device_count() and name != "cpu":
        raise ArgumentError(f"device {name}: {torch.cuda.device_count()} GPUs are visible here, numbered from 0; use one of them")
    return name


def open_device(name: str) -> str:
    """As `usable_device`, with the process made ready for long work on it."""
    device = usable_device(name)
    if device == "cpu":
        keep_freed_memory()
    return device


def usable_precision(name: PrecisionChoice, device: torch.device | str) -> Precision:
    """The precision of that name there; `auto` is bf16 on a GPU that has it, else fp32. ArgumentError for another name."""
    if name not in get_args(PrecisionChoice):
        raise ArgumentError(f"precision {name!r} is unknown; choose {', '.join(get_args(PrecisionChoice))}")
    if name != "auto":
        return name
    on_gpu = torch.device(device).type == "cuda"
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
