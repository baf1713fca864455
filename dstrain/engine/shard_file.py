"""Shards of the training state on disk: plain tensors and numbers, read without unpickling objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dstrain.errors import CheckpointError


def write_shard(path: Path, content: Mapping[str, Any]) -> None:
    """Write nested tensors and numbers. Raises CheckpointError where the disk refuses."""
    try:
        torch.save(dict(content), path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}; make room on the disk, or choose another --output") from error


def read_shard(path: Path) -> dict[str, Any]:
    """Read it back into CPU memory. Raises CheckpointError where the file is missing or damaged."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; delete its folder to resume from the checkpoint before"
        ) from error
    return content
