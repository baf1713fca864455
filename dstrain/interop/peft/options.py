"""What an export to PEFT and an import from it may be asked for. No torch, so that the command line answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The two files of an adapter."""
PEFT_KIND = "an adapter of PEFT"


@dataclass(frozen=True, kw_only=True)
class PeftExport:
    """bundle: an adapter bundle. base: of it, if it has moved."""

    bundle: Path
    output: Path
    base: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class PeftImport:
    """adapter: a directory of PEFT. base: the bundle that it adapts. output: an adapter bundle."""

    adapter: Path
    base: Path
    output: Path
    overwrite: bool = False


def is_peft(directory: Path) -> bool:
    """Whether a directory is an adapter of PEFT."""
    return (directory / CONFIG_FILE).is_file()
