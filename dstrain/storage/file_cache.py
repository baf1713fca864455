"""Copies of files from elsewhere, shared by the processes of this machine, within a limit of space.

A copy is written under the name `NAME.part` and renamed once it is whole, so a download that ends halfway leaves nothing that is
taken for the file. The writer holds a lock on the part: of several processes that need a file one downloads it, the others wait.

Each process holds a shared lock on every copy that it has open. If a new copy needs space, those that nobody holds are removed,
the one first that was opened longest ago. These are locks of `flock`: they belong to an open file, so that a process may hold one
copy twice and release one hold; `lock.py` has the other kind. A killed process releases its locks.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from dstrain.errors import StorageError
from dstrain.log import logger
from dstrain.storage.atomic import named_if_full

DIRECTORY_VARIABLE = "DSTRAIN_CACHE"
LIMIT_VARIABLE = "DSTRAIN_CACHE_GIB"
DEFAULT_GIB = 100.0
PART_SUFFIX = ".part"
POLL_SECONDS = 0.05


class Hold:
    """Keeps a copy from being removed, until it is collected. descriptor: of the open file, with a shared lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


class FileCache:
    """directory: holds the copies, and directories of them. limit: bytes of all copies, exceeded only by those in use.

    suffixes: of the files that are copies; others in the directory are neither counted nor removed.
    """

    def __init__(self, directory: Path, limit: float, suffixes: tuple[str, ...] = (".arrow", ".npy")) -> None:
        self.directory = directory
        self.limit = limit
        self._suffixes = (*suffixes, PART_SUFFIX)
        self._warned = False

    def open(self, path: Path, size: int, download: Callable[[BinaryIO], None]) -> Hold:
        """Hold the copy at `path`, of `size` bytes; `download` writes it into an empty file if there is none.

        Raises what `download` raises, and StorageError if the disk is full.
        """
        while (hold := _hold(path)) is None:
            self._download(path, size, download)
        return hold

    def _download(self, path: Path, size: int, download: Callable[[BinaryIO], None]) -> None:
        """Write the copy, unless another process has done so meanwhile."""
        part = path.with_name(path.name + PART_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            # Not a lock that waits: a finished part is the copy, on which its holds are shared locks.
            while not _locked(file.fileno()) and not path.exists():
                time.sleep(POLL_SECONDS)
            if path.exists() or not _is_at(part, file.fileno()):
                return
            try:
                file.truncate(0)  # what a killed process has left
                self._free_space(size)
                with named_if_full(path):
                    download(file)
                    file.flush()
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _free_space(self, size: int) -> None:
        copies = sorted((stat.st_mtime_ns, stat.st_size, path) for path, stat in self._copies())
        excess = sum(copy_size for _, copy_size, _ in copies) + size - self.limit
        for _, copy_size, path in copies:
            if excess <= 0:
                return
            if path.suffix != PART_SUFFIX and _removed(path):
                excess -= copy_size
        if excess > 0 and not self._warned:
            self._warned = True
            logger.warning(
                "%s: the files in use take %.1f GiB more than %s allows (%.1f): raise it, or choose an order that reads fewer "
                "shards at a time (batching.shuffle: {kind: shard_window})",
                self.directory,
                excess / 2**30,
                LIMIT_VARIABLE,
                self.limit / 2**30,
            )

    def _copies(self) -> list[tuple[Path, os.stat_result]]:
        copies = []
        for folder, _, names in os.walk(self.directory):
            for name in names:
                if name.endswith(self._suffixes):
                    path = Path(folder, name)
                    try:
                        copies.append((path, path.stat()))
                    except FileNotFoundError:  # another process has removed or renamed it
                        continue
        return copies


def cache_limit(environment: Mapping[str, str]) -> float:
    """Bytes that the copies may take, by the environment. Raises StorageError for what is no number."""
    text = environment.get(LIMIT_VARIABLE, str(DEFAULT_GIB))
    try:
        gibibytes = float(text)
    except ValueError:
        gibibytes = 0.0
    if not 0 < gibibytes < float("inf"):
        raise StorageError(f"{LIMIT_VARIABLE}={text!r} is no number above 0; set it to the GiB that copies may take, or unset it")
    return gibibytes * 2**30


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Where the copies lie, by the environment: a local disk that all ranks of a machine share."""
    home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(environment.get(DIRECTORY_VARIABLE) or Path(home) / "dstrain")


def _hold(path: Path) -> Hold | None:
    """None if there is no copy. Marks it as used now."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    hold = Hold(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while another process removes it, a moment
    if not _is_at(path, descriptor):
        return None
    os.utime(descriptor)
    return hold


def _removed(path: Path) -> bool:
    """Remove a copy, unless it is held."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        removable = _locked(descriptor) and _is_at(path, descriptor)
        if removable:
            path.unlink()
        return removable
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether nobody else has locked the open file, which is locked then."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
