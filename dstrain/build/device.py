"""The device that a user names."""

from __future__ import annotations

import re

import torch

from dstrain.errors import DstrainError
from dstrain.ops.allocator import keep_freed_memory


def usable_device(name: str) -> str:
    """The device of that name here; `auto` is a GPU if there is one. Raises DstrainError if there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    named = re.fullmatch(r"cpu|cuda(:(\d+))?", name)
    if named is None:
        raise DstrainError(f"device {name!r} is unknown; choose cpu, cuda, cuda:N or auto")
    if name != "cpu" and not torch.cuda.is_available():
        raise DstrainError(f"device {name}: no GPU is visible here; use cpu or auto")
    if int(named[2] or 0) >= torch.cuda.device_count() and name != "cpu":
        raise DstrainError(f"device {name}: {torch.cuda.device_count()} GPUs are visible here, numbered from 0; use one of them")
    return name


def open_device(name: str) -> str:
    """As `usable_device`, with the process made ready for long work on it."""
    device = usable_device(name)
    if device == "cpu":
        keep_freed_memory()
    return device
