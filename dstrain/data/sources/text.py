"""Text files as blocks of raw lines: checked once, then read in order.

A line ends at "\\n" and nowhere else; a "\\r" before it is stripped, a byte order mark at the start of a file too. Compressed
files are decompressed while reading (`opening.py`). Blocks are cut by lines and by bytes, so that memory does not grow with the
corpus, and they hold bytes, so that the encoding processes decode them. A scan costs one pass before the first sentence is
encoded (about 0.5 GB/s); it finds every fault of encoding, length and columns at once instead of hours later.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from dstrain.data.sources.opening import input_name, open_lines, require_text
from dstrain.errors import DataError
from dstrain.log import logger
from dstrain.storage.hashing import sha256_of_file

MAX_BLOCK_LINES = 4096
MAX_BLOCK_BYTES = 1 << 20
SCAN_BYTES = 1 << 22
BYTE_ORDER_MARK = "\ufeff"
CSV_FIELD = re.compile(rb'(?:^|\t)"((?:[^"\t\n]|"")+)"(?=\t|\r?$)', re.MULTILINE)
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


class FileScan(NamedTuple):
    """The result of one pass over a file. lines: an unfinished last line counts; sha256: of the bytes on the disk."""

    lines: int
    sha256: str


class TextBlock(NamedTuple):
    """Consecutive lines of one corpus. first: number of the first, from 0; columns: the same lines of each of its files."""

    first: int
    num_lines: int
    columns: tuple[bytes, ...]


def expand_path(path: str) -> Path:
    """Replace every `${NAME}` and `$NAME` by the environment's value, and `~` by the home directory.

    Raises DataError naming a variable that is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise DataError(f"{path}: the environment variable {name} is not set; set it, or write the path out in the recipe")
        return os.environ[name]

    return Path(VARIABLE.sub(value, path)).expanduser()


def scan_file(path: Path, check: Callable[[bytes, int], None] | None = None) -> FileScan:
    """Count lines, hash the file, and check that it is whole, valid UTF-8 and free of NUL.

    check: called with some whole lines and the number of lines before them. Raises DataError naming the file, and the line if
    there is one.
    """
    lines, last = 0, b"\n"
    with open_lines(path) as stream:
        while chunk := stream.read(SCAN_BYTES) + stream.readline():
            check_text(path, chunk, lines)
            if check is not None:
                check(chunk, lines)
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return FileScan(lines + (last != b"\n"), sha256_of_file(path))


def scan_tsv(path: Path) -> FileScan:
    """As `scan_file`; every line must have as many columns as the first, or a tab inside a sentence would cut it in two.

    Warns of a field that is quoted as in CSV, because quotes are text here.
    """
    tabs: int | None = None
    warned = False

    def check(chunk: bytes, lines_before: int) -> None:
        nonlocal tabs, warned
        quoted = next((field for field in CSV_FIELD.finditer(chunk) if b'""' in field[1]), None) if b'""' in chunk else None
        if quoted is not None and not warned:
            line, warned = lines_before + chunk.count(b"\n", 0, quoted.start(1)) + 1, True
            logger.warning(
                '%s:%d: a field in quotes with "" inside, as in CSV; quotes are text here: write it unquoted', path, line
            )
        counts = [line.count(b"\t") for line in chunk.removesuffix(b"\n").split(b"\n")]
        tabs = counts[0] if tabs is None else tabs
        if counts.count(tabs) == len(counts):
            return
        wrong = next(number for number, count in enumerate(counts) if count != tabs)
        raise DataError(
            f"{path}:{lines_before + wrong + 1}: {counts[wrong] + 1} tab-separated columns, line 1 has {tabs + 1}; fix the line: "
            f"it may {'hold a tab inside a sentence' if counts[wrong] > tabs else 'lack a tab, or be blank'}"
        )

    return scan_file(path, check)


def scan_jsonl(path: Path) -> FileScan:
    """As `scan_file`; blank lines at the end do not count. An array of JSON is refused by name."""
    lines = 0

    def check(chunk: bytes, lines_before: int) -> None:
        nonlocal lines
        content = chunk.rstrip()
        if content:
            lines = lines_before + content.count(b"\n") + 1
        if lines_before == 0 and content.removeprefix(BYTE_ORDER_MARK.encode()).lstrip().startswith(b"["):
            raise DataError(f"{path}: a JSON array, not one object a line; convert it: jq -c '.[]' {path.name} > NEW.jsonl")

    return scan_file(path, check)._replace(lines=lines)


def check_text(name: Path | str, chunk: bytes, lines_before: int) -> None:
    """Raise DataError, with file and line, if whole lines hold a NUL, are not UTF-8, or end in "\\r" alone."""
    position = chunk.find(b"\0")
    if position < 0 and lines_before == 0 and b"\n" not in chunk and b"\r" in chunk.rstrip(b"\r"):
        raise DataError(f"{name}: its lines end in \\r, not in \\n; convert it: tr '\\r' '\\n' < FILE > NEW")
    if position < 0 and chunk.isascii():
        return
    if lines_before == 0:
        require_text(name, chunk)
    if position >= 0:
        line = lines_before + chunk.count(b"\n", 0, position) + 1
        raise DataError(f"{name}:{line}: a NUL character; remove it from the text, or convert the file if it is UTF-16")
    try:
        chunk.decode("utf-8")
    except UnicodeDecodeError as error:
        line = lines_before + chunk.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: invalid UTF-8 (byte 0x{chunk[error.start]:02x}); convert the file to UTF-8") from error


def decode_line(line: bytes, name: Path | str, number: int) -> str:
    """One line without its end. number: from 1. Raises DataError as `check_text`."""
    check_text(name, line, number - 1)
    text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    return text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


class BlockReader:
    """Line-parallel files, open at line `start`."""

    def __init__(self, paths: Sequence[Path], start: int = 0) -> None:
        self._paths = paths
        self._next = start
        self._stack = ExitStack()
        self._streams = [self._stack.enter_context(open_lines(path)) for path in paths]
        for stream in self._streams:
            deque(islice(stream, start), maxlen=0)

    def read(self, max_lines: int) -> TextBlock:
        """The next lines, at most `max_lines`; fewer if they are long. Raises DataError if a file ends before."""
        first, lines = self._paths[0], _take(self._streams[0], min(max_lines, MAX_BLOCK_LINES))
        columns = [lines, *(list(islice(stream, len(lines))) for stream in self._streams[1:])]
        for path, column in zip(self._paths, columns, strict=True):
            if not lines or len(column) < len(lines):
                raise DataError(
                    f"{path} has become shorter since preparation began (read with {first}); run again with --overwrite"
                )
        block = TextBlock(self._next, len(lines), tuple(b"".join(column) for column in columns))
        self._next += len(lines)
        return block

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)


def _take(stream: BinaryIO, max_lines: int) -> list[bytes]:
    lines, size = [], 0
    for line in islice(stream, max_lines):
        lines.append(line)
        size += len(line)
        if size >= MAX_BLOCK_BYTES:
            break
    return lines


def decode_lines(block: TextBlock, column: int) -> list[str]:
    """The lines of one column, without their ends. `scan_file` has checked the bytes, so a fault here is a change since then."""
    try:
        text = block.columns[column].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 after line {block.first}: the text has changed since preparation began") from error
    if block.first == 0:
        text = text.removeprefix(BYTE_ORDER_MARK)
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


def read_lines(path: Path | str) -> list[str]:
    """All lines of a file that fits into memory, without their ends, in one reading; `-` is standard input.

    Raises DataError as `scan_file`.
    """
    with open_lines(path) as stream:
        content = stream.read()
    check_text(input_name(path), content, 0)
    return decode_lines(TextBlock(0, 0, (content,)), 0) if content else []
