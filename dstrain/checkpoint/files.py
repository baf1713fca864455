"""Files that survive a kill or a power cut: written aside, forced to the disk, then renamed.

A rename within one file system is atomic; it is durable once the folder that holds the name has been synced too. The cost is
one wait for the disk per file and folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dstrain.errors import DstrainError
from dstrain.protocols import Ranks

R = TypeVar("R")
BLOCK = 1 << 22
"""Bytes read at a time when hashing."""


def sync(path: Path) -> None:
    """Force a file, or the names within a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` by a file with this content; whoever looks finds the old or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)  # noqa: PTH105
    sync(path.parent)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def replace_directory(new: Path, directory: Path) -> None:
    """Put the finished folder `new` in the place of `directory`, which may exist.

    A kill between the two renames leaves the old folder as `.NAME.old`; `restore_directories` brings it back.
    """
    old = directory.with_name(f".{directory.name}.old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_directories(parent: Path) -> None:
    """Undo whatever `replace_directory` left half done in `parent`."""
    for old in parent.glob(".*.old"):
        directory = old.with_name(old.name[1 : -len(".old")])
        if directory.exists():
            shutil.rmtree(old)
        else:
            old.rename(directory)


def together(ranks: Ranks, kind: type[DstrainError], doing: str, action: Callable[[], R]) -> R:
    """Run `action` on every rank; where it fails on one, all raise the same error.

    Without this a rank with a full disk would leave while the others wait for it for ever. Raises the failing rank's own
    DstrainError, or `kind` with a sentence that begins with `doing`.
    """
    problem: DstrainError | None = None
    try:
        result = action()
    except DstrainError as error:
        problem = error
    except (OSError, RuntimeError) as error:
        where = f" on rank {ranks.rank}" if ranks.size > 1 else ""
        problem = kind(f"{doing} failed{where}: {error}")
        problem.__cause__ = error
    if ranks.all_true(problem is None):
        return result
    reports = ranks.gather_objects((type(problem), str(problem)) if problem is not None else None)
    first, text = next(filter(None, reports))
    raise problem if problem is not None and str(problem) == text else first(text)
