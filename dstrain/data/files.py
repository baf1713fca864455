"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed.

The SHA-256 is taken from the bytes as they pass, so a finished file is never read again to be described. A full disk becomes
one clear error; whatever was finished before stays.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from dstrain.errors import DataError

T = TypeVar("T")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
HASH_CHUNK = 1 << 22


class HashingWriter(io.RawIOBase):
    """A binary stream that counts and hashes what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        """Pass `data` on whole."""
        self._file.write(data)
        self._hash.update(data)
        written = memoryview(data).nbytes
        self.size += written
        return written

    @property
    def sha256(self) -> str:
        """Of everything written so far, in hexadecimal."""
        return self._hash.hexdigest()


@contextmanager
def atomic_writer(path: Path) -> Iterator[HashingWriter]:
    """Open `path` for writing; it appears only when the block ends without an error.

    Raises DataError where the disk is full, or where another process writes the same file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield HashingWriter(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except FileNotFoundError as error:
        if error.filename != str(temporary) or not path.parent.is_dir():
            raise
        raise DataError(f"another process has written {path} at the same time; give every process work of its own") from error
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DataError(
                f"no space left to write {path} ({error.strerror}); finished files are kept: free some space and run the same "
                "command again to go on"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all."""
    with atomic_writer(path) as writer:
        writer.write(content)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checking(items: Sequence[T]) -> Iterable[T]:
    """The items, with a bar where a person looks on: the checksums of hundreds of gigabytes take minutes."""
    return tqdm(items, desc="checking", unit=" files", disable=None)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
