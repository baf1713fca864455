"""What a verb may write over: never what it reads, and what is there already only on request.

Every verb that writes asks here twice: on the command line, before anything is loaded, and again where the output is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dstrain.errors import StorageError, TrainingError
from dstrain.storage.directory_kind import directory_kind
from dstrain.storage.remote import is_shortened_url

OWN_FILES = {".lock", "run.json", "run.json.tmp", "recipe.yaml.tmp"}
"""Possible files of a run that was killed while it was made."""


def check_output_file(output: Path, inputs: Mapping[str, Path | None], *, overwrite: bool) -> None:
    """`check_output` for a file."""
    if output.is_dir():
        raise StorageError(f"--output {output} is a directory; name a file, such as {output / 'NAME'}")
    check_output(output, inputs, overwrite=overwrite)


def check_output(output: Path, inputs: Mapping[str, Path | None], *, overwrite: bool) -> None:
    """Raise StorageError if writing `output` would fail or destroy something.

    inputs: what is read, by the names that messages give it; None for one that is not read. An output that is an input, holds one
    or is part of one, through links too, is always refused; any other file or directory with content, unless `overwrite`. Devices
    and pipes hold nothing. A run is no whole: what it holds may be replaced, but for the inputs themselves.
    """
    check_output_path(output, inputs)
    for name, path in inputs.items():
        if (
            path is not None
            and output.exists()
            and path.resolve() in output.resolve().parents
            and directory_kind(path) != "a run"
        ):
            raise StorageError(f"--output {output} is part of {name} ({path}), which would be lost; choose another --output")
    is_full = any(output.iterdir()) if output.is_dir() else output.is_file() and output.stat().st_size
    if is_full and not overwrite:
        raise StorageError(f"{output} exists; add --overwrite to replace it, or choose another --output")


def check_output_of_kind(output: Path, inputs: Mapping[str, Path | None], *, marker: str, kind: str, overwrite: bool) -> None:
    """`check_output` for a directory that replaces only its own kind, known by the file `marker`. kind: in words."""
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / marker).exists()):
        raise StorageError(f"{output} exists and is not {kind}, so it is not replaced; choose another --output")
    check_output(output, inputs, overwrite=overwrite)


def check_output_path(output: Path, inputs: Mapping[str, Path | None]) -> None:
    """The first half of `check_output`, for an output that is continued where it exists."""
    if is_shortened_url(str(output)):
        raise StorageError(f"--output {output} is a URL, and only --data may be one; write to a directory, then upload that")
    if output.exists() and not (output.is_file() or output.is_dir()):
        return
    try:
        resolved = output.resolve()
    except (OSError, RuntimeError) as error:  # the second one of Python before 3.13
        raise StorageError(f"--output {output} is a link that leads back to itself; choose another --output") from error
    parent = next(path for path in (resolved, *resolved.parents) if path.exists() and not (path == resolved and path.is_file()))
    if not parent.is_dir():
        raise StorageError(f"--output {output}: {parent} is a file, not a directory; choose another --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"--output {output}: {parent} cannot be written; choose another --output, or change the permissions")
    if not output.exists():
        return
    for name, path in inputs.items():
        if path is None or not path.exists():
            continue
        if path.samefile(output):
            raise StorageError(f"--output {output} is the same as {name}, which would be lost; choose another --output")
        if resolved in path.resolve().parents:
            raise StorageError(f"--output {output} holds {name} ({path}), which would be lost; choose another --output")


def require_run_as_output(directory: Path) -> None:
    """Raise TrainingError unless a run may begin or go on here; a bundle, too, has a recipe.yaml, but no run.json."""
    if directory.exists() and not directory.is_dir():
        raise TrainingError(f"--output {directory} is a file; name a directory")
    others = sorted({path.name for path in directory.iterdir()} - OWN_FILES) if directory.is_dir() else []
    if others and not (directory / "run.json").exists():
        raise TrainingError(
            f"--output {directory} is no run (it has no run.json) and not empty (it holds {', '.join(others[:3])}): "
            "name a new directory, or that of an earlier run"
        )
