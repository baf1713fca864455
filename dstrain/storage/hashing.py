"""SHA-256 of files, of text, of plain values, and of bytes on their way to a file. Always in hexadecimal."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 22


def sha256_of_file(path: Path) -> str:
    """Of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    """Of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_text(text: str) -> str:
    """Of the UTF-8 bytes of `text`."""
    return sha256_of_bytes(text.encode())


def sha256_of_json(value: Any) -> str:
    """Of a value that JSON can hold; the order of keys does not matter."""
    return sha256_of_text(json.dumps(value, sort_keys=True))


class HashingWriter(io.RawIOBase):
    """A binary stream that counts and hashes the bytes that it passes on, so that a finished file need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        """Pass on all of `data`."""
        self._file.write(data)
        self._hash.update(data)
        written = memoryview(data).nbytes
        self.size += written
        return written

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._hash.hexdigest()
