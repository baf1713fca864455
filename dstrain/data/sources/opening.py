"""Text files opened by what they are: plain, compressed, a pipe, or standard input; what is no text is named.

Compression is known by the first bytes, so a suffix is not needed. gzip, bzip2, xz and zstd are decompressed while reading. The
first bytes are read once and put back, so that a pipe is read like a file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dstrain.errors import DataError
from dstrain.log import logger
from dstrain.storage.atomic import is_stream
from dstrain.storage.file_format import HEAD_BYTES, compression_of, foreign_format

STANDARD = "-"
STANDARD_INPUT = "standard input"
BUFFER_BYTES = 1 << 16


class _Decompressed(io.RawIOBase):
    """Compressed streams, one after another, and zero bytes behind the last. Python's own readers pass over anything there.

    decompressor: makes one that reads one stream. Raises EOFError if the last is cut short.
    """

    def __init__(self, raw: BinaryIO, decompressor: Callable[[], Any]) -> None:
        super().__init__()
        self._raw = raw
        self._new = decompressor
        self._current = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            content = b""
            if self._current.eof:
                content = self._current.unused_data.lstrip(b"\0")
                while not content and (more := self._raw.read(BUFFER_BYTES)):
                    content = more.lstrip(b"\0")
                if not content:
                    return 0
                self._current = self._new()
            elif self._current.needs_input and not (content := self._raw.read(BUFFER_BYTES)):
                raise EOFError
            if result := self._current.decompress(content, len(buffer)):
                buffer[: len(result)] = result
                return len(result)


def _open_zstd(stream: BinaryIO) -> Any:
    import pyarrow as pa  # a fifth of a second that other files need not cost

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream),
    "bzip2": lambda stream: _Decompressed(stream, bz2.BZ2Decompressor),
    "xz": lambda stream: _Decompressed(stream, lzma.LZMADecompressor),
    "zstd": _open_zstd,
}
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


@contextmanager
def open_lines(path: Path | str) -> Iterator[BinaryIO]:
    """Open text for reading by lines, once, from the first line on; `-` is standard input.

    Raises DataError naming the file: it cannot be read, is damaged, or is no text.
    """
    name, compression = input_name(path), None
    try:
        with _open_raw(path) as raw:
            head = _read_head(raw)
            # An empty file is empty, whatever it is called; a compressed one would have a header.
            compression = compression_of(head) or (SUFFIXES.get(Path(path).suffix) if head else None)
            stream = io.BufferedReader(_Rewound(head, raw), BUFFER_BYTES)
            if compression is not None:
                stream = io.BufferedReader(DECOMPRESSORS[compression](stream), BUFFER_BYTES)
            require_text(name, stream.peek(HEAD_BYTES))
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(name, compression, error) from error
    except OSError as error:
        if compression is not None and error.errno is None:
            raise _damaged(name, compression, error) from error
        raise DataError(f"{name}: {error.strerror or error}; check the path") from error


def _damaged(name: str, compression: str | None, error: Exception) -> DataError:
    if isinstance(error, EOFError) or "runcated" in str(error):
        return DataError(f"{name}: the {compression} file is truncated; fetch or compress it again")
    return DataError(f"{name}: not a whole {compression} file ({error}); fetch or compress it again")


def require_text(name: Path | str, head: bytes) -> None:
    """Raise DataError if what begins so is no text, saying what it is."""
    if words := foreign_format(head[:HEAD_BYTES]):
        raise DataError(f"{name}: {words}")


def input_name(path: Path | str) -> str:
    """The name of an input in messages."""
    return STANDARD_INPUT if str(path) == STANDARD else str(path)


def require_file(path: Path) -> Path:
    """The path of something that is to be read several times. Raises DataError for a pipe, a device or standard input."""
    if is_stream(path) or str(path) == STANDARD or str(path).startswith(("/dev/", "/proc/")):
        raise DataError(f"{path}: a stream is read only once, and this is read several times; write it to a file and name that")
    return path


def require_different_streams(paths: Mapping[str, Path | str | None]) -> None:
    """Raise DataError if two options name one pipe or standard input, of which the second would find nothing, or wait forever.

    paths: by option; None if it is not given.
    """
    seen: dict[object, str] = {}
    for option, path in paths.items():
        stream = None if path is None else _stream_identity(path)
        if stream is None:
            continue
        if stream in seen:
            raise DataError(
                f"{seen[stream]} and {option} both read {input_name(str(path))}, which can be read only once; name a file"
            )
        seen[stream] = option


def _stream_identity(path: Path | str) -> object:
    """What tells a pipe, a device or standard input from others; None for what can be opened again."""
    try:
        status = os.fstat(0) if str(path) == STANDARD else Path(path).stat()
    except OSError:
        return STANDARD if str(path) == STANDARD else None
    reopens = str(path) != STANDARD and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))
    return None if reopens else (status.st_dev, status.st_ino)


@contextmanager
def _open_raw(path: Path | str) -> Iterator[Any]:
    if str(path) != STANDARD:
        with Path(path).open("rb", 0) as file:
            yield file
    elif sys.stdin is None:
        raise DataError(f"{STANDARD_INPUT} is closed; name a file, or pipe text in")
    else:
        if sys.stdin.isatty():
            logger.info("reading %s, a line a sentence; Ctrl-D ends it", STANDARD_INPUT)
        yield sys.stdin.buffer


def _read_head(stream: Any) -> bytes:
    """The first bytes. A pipe hands out what its writer has written so far, so one `read` may give few of them."""
    head = b""
    while len(head) < HEAD_BYTES and (more := stream.read(HEAD_BYTES - len(head))):
        head += more
    return head


class _Rewound(io.RawIOBase):
    """A stream of which `head` has been read, from its beginning again."""

    def __init__(self, head: bytes, rest: Any) -> None:
        super().__init__()
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            return int(self._rest.readinto(buffer))
        size = min(len(buffer), len(self._head))
        buffer[:size], self._head = self._head[:size], self._head[size:]
        return size
