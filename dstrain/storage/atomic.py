"""Files and directories that are complete or absent, whichever process is killed and at any time.

New content is written under a temporary name in the same directory, flushed to the disk and renamed. A rename within a file
system is atomic; it survives a power cut once the directory that holds the name is flushed as well. Cost: one wait for the disk
per file and per directory.

A directory cannot be replaced in one rename: the old one is first renamed to `.NAME.old`. `restore_directories` and
`complete_version` undo a replacement that was cut between its two renames.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dstrain.errors import DstrainError, StorageError
from dstrain.storage.hashing import HashingWriter

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
READ_ATTEMPTS = 10
_T = TypeVar("_T")


@contextmanager
def atomic_writer(path: Path) -> Iterator[HashingWriter]:
    """Open `path` for writing; it appears, or is replaced, only when the block ends without an error.

    A pipe or a device is written as it is. Raises StorageError if the disk is full, or if another process writes the same file.
    """
    if is_stream(path):  # a rename would put a file in the place of a pipe, or of /dev/null
        with named_if_full(path), path.open("wb") as stream:
            yield HashingWriter(stream)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with named_if_full(path), temporary.open("wb") as file:
            yield HashingWriter(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except FileNotFoundError as error:
        if error.filename != str(temporary) or not path.parent.is_dir():
            raise
        raise StorageError(f"another process has written {path} at the same time; give every process its own work") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named_if_full(path: Path) -> Iterator[None]:
    """Raise StorageError that names `path` if the disk is full; the error of the system names no file that is open."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StorageError(
                f"no space left to write {path} ({error.strerror}); finished files are kept: free some space and run the same "
                "command again to go on"
            ) from error
        raise


def is_stream(path: Path) -> bool:
    """Whether there is a pipe or a device, which holds nothing and is read and written once."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_file(path: Path, content: bytes) -> None:
    """Write a file, or replace one, atomically. Raises StorageError as `atomic_writer`."""
    with atomic_writer(path) as writer:
        writer.write(content)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush everything in a directory, and the directory itself, to the disk."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """An empty directory to write into, which replaces `directory` when the block ends without an error."""
    draft = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        sync_tree(draft)
        replace_directory(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def replace_directory(new: Path, directory: Path) -> None:
    """Rename the finished directory `new` to `directory`, which may exist."""
    old = previous_version(directory)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_directories(parent: Path) -> None:
    """Undo every replacement in `parent` that was cut short."""
    for old in parent.glob(".*.old"):
        directory = old.with_name(old.name[1 : -len(".old")])
        if directory.exists():
            shutil.rmtree(old)
        else:
            old.rename(directory)


def complete_version(directory: Path) -> Path:
    """The directory, or its previous version if a replacement was cut short; for readers, which must not rename."""
    old = previous_version(directory)
    return old if not directory.exists() and old.is_dir() else directory


def read_unreplaced(choose: Callable[[], Sequence[Path]], read: Callable[[Sequence[Path]], _T]) -> _T:
    """`read(choose())`, again if one of the directories was replaced or removed meanwhile: by a training, for example.

    So no result mixes two versions, and an error is one of directories that stayed as they were.
    """
    for _ in range(READ_ATTEMPTS - 1):
        directories = choose()
        before = [_version(directory) for directory in directories]
        try:
            result = read(directories)
        except (OSError, DstrainError):
            if None not in before and [_version(directory) for directory in directories] == before:
                raise
            continue
        if [_version(directory) for directory in directories] == before:
            return result
    return read(choose())


def _version(directory: Path) -> tuple[int, ...] | None:
    """Changes if the directory is replaced, even by one that gets its inode; None if it is absent."""
    try:
        stat = complete_version(directory).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, which costs no space, or an atomic copy on a file system that has none. Replaces `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
        sync(target.parent)
    except OSError:
        with atomic_writer(target) as sink, source.open("rb") as file:
            shutil.copyfileobj(file, sink)


def previous_version(directory: Path) -> Path:
    """Where `replace_directory` moves a directory until the new one is in its place."""
    return directory.parent / f".{directory.name}.old"  # with_name refuses "."
