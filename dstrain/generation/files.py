"""A text file in, a file of answers out: chunk by chunk, in input order, with bounded memory.

Answers go to OUTPUT.partial, which becomes OUTPUT when all are there; after an error or an interruption the finished chunks stay
in OUTPUT.partial. Input ends a line at "\\n" and nowhere else; "\\r" before it is dropped; ".gz" is decompressed.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import BinaryIO, TextIO

from dstrain.errors import DataError
from dstrain.generation.formats import Answer
from dstrain.generation.generator import TextHypothesis
from dstrain.log import logger

CHUNK_LINES = 4096
STANDARD = "-"
STANDARD_INPUT = "standard input"
Translate = Callable[[Sequence[str], int], list[list[TextHypothesis]]]


def translate_file(
    translate: Translate,
    source: str,
    output: str,
    render: Callable[[Answer], str],
    *,
    reference: str | None = None,
    chunk_lines: int = CHUNK_LINES,
) -> tuple[int, int]:
    """Answer every line of `source`; returns how many lines and generated tokens there were.

    translate: (lines, number of the first) -> hypotheses. source, output: paths, `-` for standard input and output. reference: a
    file with as many lines. DataError: a missing file, invalid UTF-8, a NUL, or a reference of another length.
    """
    lines = tokens = 0
    with open_output(output) as out:
        try:
            for chunk, references in paired_chunks(source, reference, chunk_lines):
                found = translate(chunk, lines + 1)
                for number, (line, hypotheses, known) in enumerate(zip(chunk, found, references, strict=True), lines + 1):
                    out.write(render(Answer(number, line, hypotheses, known)))
                    tokens += sum(len(hypothesis.tokens) for hypothesis in hypotheses)
                out.flush()
                lines += len(chunk)
        except BaseException:
            if lines and output != STANDARD:
                logger.error("stopped; the answers to the first %d lines are kept in %s", lines, partial_path(output))
            raise
    return lines, tokens


def paired_chunks(source: str, reference: str | None, chunk_lines: int) -> Iterator[tuple[list[str], list[str] | list[None]]]:
    """The lines of `source`, some at a time, with the same lines of `reference`, None without one."""
    if reference is None:
        yield from ((chunk, [None] * len(chunk)) for chunk in read_chunks(source, chunk_lines))
        return
    done = 0
    nothing: list[str] = []
    for chunk, known in zip_longest(read_chunks(source, chunk_lines), read_chunks(reference, chunk_lines), fillvalue=nothing):
        if len(chunk) != len(known):
            short, long = (source, reference) if len(chunk) < len(known) else (reference, source)
            end = done + min(len(chunk), len(known))
            raise DataError(f"{short} ends after line {end}, {long} goes on; give one reference for each line")
        yield chunk, known
        done += len(chunk)


def read_chunks(path: str, chunk_lines: int) -> Iterator[list[str]]:
    """The lines of a file, or of standard input for `-`, some at a time, without their ends."""
    name = STANDARD_INPUT if path == STANDARD else path
    with open_input(path) as stream:
        first = 1
        while raw := list(islice(stream, chunk_lines)):
            yield [decode_line(line, name, number) for number, line in enumerate(raw, first)]
            first += len(raw)


def decode_line(line: bytes, name: str, number: int) -> str:
    """One line without its end. DataError for invalid UTF-8 and NUL, naming file and line."""
    if b"\0" in line:
        raise DataError(f"{name}:{number}: a NUL character; remove it from the text")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(f"{name}:{number}: invalid UTF-8 (byte 0x{byte:02x}); convert the text to UTF-8") from error
    text = text.removesuffix("\n").removesuffix("\r")
    return text.removeprefix("\ufeff") if number == 1 else text


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """A file, .gz or plain, or standard input. DataError where it cannot be read."""
    if path == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path of --input or --reference") from error


@contextmanager
def open_output(path: str) -> Iterator[TextIO]:
    """Standard output for `-`; else a file that is renamed to `path` when the block ends well. DataError where that fails."""
    if path == STANDARD:
        yield standard_output()
        sys.stdout.flush()
        return
    partial = partial_path(path)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as out:
            yield out
        partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; free some space or choose another --output") from error
    finally:
        if partial.is_file() and partial.stat().st_size == 0:
            partial.unlink()


def standard_output() -> TextIO:
    """Standard output in UTF-8, whatever the locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    return sys.stdout


def partial_path(path: str) -> Path:
    """Where answers wait until all are there."""
    return Path(f"{path}.partial")


def count_lines(path: str) -> int | None:
    """How many lines a plain file has, for a progress bar; None where that would cost decompression or waiting."""
    if path == STANDARD or path.endswith(".gz") or not Path(path).is_file():
        return None
    with Path(path).open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
