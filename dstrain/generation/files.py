"""A text file in, a file of answers out: chunk by chunk, in input order, with bounded memory.

Answers go to OUTPUT.partial, which becomes OUTPUT when all are there; after an error or an interruption the finished chunks stay
in OUTPUT.partial. Input is read by the rules of `data/sources/text.py`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dstrain.data.sources.opening import STANDARD, input_name, open_lines, require_different_streams
from dstrain.data.sources.text import decode_line
from dstrain.errors import DataError
from dstrain.generation.formats import Answer
from dstrain.log import logger
from dstrain.storage.atomic import is_stream, named_if_full, sync
from dstrain.storage.file_format import HEAD_BYTES, compression_of
from dstrain.storage.outputs import check_output_file, check_output_path

if TYPE_CHECKING:  # so that the command line checks the files without loading torch
    from dstrain.generation.generator import TextHypothesis

CHUNK_LINES = 4096


@dataclass(frozen=True)
class Chunk:
    """Some lines of the input. first: number of the first, from 1. references, prefixes: of these lines; None without a file."""

    first: int
    lines: Sequence[str]
    references: Sequence[str] | None = None
    prefixes: Sequence[str] | None = None


def check_texts(
    *, bundle: Path, input: str, output: str, reference: str | None, prefix: str | None, score_only: bool, overwrite: bool
) -> None:
    """Raise a DstrainError for whatever is wrong with the files of `dstrain generate` before one is read or written."""
    if score_only and reference is None:
        raise DataError("--score-only has nothing to score; add --reference FILE")
    named = {"--input": input, "--reference": reference, "--prefix": prefix}
    require_different_streams(named)
    paths = {name: Path(path) for name, path in named.items() if path not in {None, STANDARD}}
    for path in paths.values():
        try:
            path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; check the path") from error
    if output != STANDARD:
        check_output_file(Path(output), {**paths, "BUNDLE": bundle}, overwrite=overwrite)
        check_output_path(partial_path(output), paths)


def translate_file(
    translate: Callable[[Chunk], list[list[TextHypothesis]]],
    source: str,
    output: str,
    render: Callable[[Answer], str],
    *,
    reference: str | None = None,
    prefix: str | None = None,
    chunk_lines: int = CHUNK_LINES,
) -> tuple[int, int]:
    """Answer every line of `source`; returns how many lines and generated tokens there were.

    translate: the hypotheses of each line of a chunk. source, output: paths, `-` for standard input and output. reference,
    prefix: files with as many lines. DataError: a missing file, invalid UTF-8, a NUL, or unequal numbers of lines.
    """
    lines = tokens = 0
    with open_output(output) as out:
        try:
            for chunk in parallel_chunks(source, reference, prefix, chunk_lines):
                known: Sequence[str | None] = chunk.references or [None] * len(chunk.lines)
                answers = zip(chunk.lines, translate(chunk), known, strict=True)
                for number, (line, hypotheses, human) in enumerate(answers, chunk.first):
                    out.write(render(Answer(number, line, hypotheses, human)))
                    tokens += sum(len(hypothesis.tokens) for hypothesis in hypotheses)
                out.flush()
                lines += len(chunk.lines)
        except BaseException:
            if lines and output != STANDARD:
                logger.error("stopped; the answers to the first %d lines are kept in %s", lines, partial_path(output))
            raise
    return lines, tokens


def parallel_chunks(source: str, reference: str | None, prefix: str | None, chunk_lines: int) -> Iterator[Chunk]:
    """The lines of `source`, some at a time, with the same lines of the other files."""
    paths = [path for path in (source, reference, prefix) if path is not None]
    files = [read_chunks(path, chunk_lines) for path in paths]
    first = 1
    nothing: list[str] = []
    for columns in zip_longest(*files, fillvalue=nothing):
        lines = columns[0]
        if any(len(column) != len(lines) for column in columns):
            counts = [first - 1 + len(column) + sum(map(len, rest)) for column, rest in zip(columns, files, strict=True)]
            totals = ", ".join(f"{input_name(path)} {count}" for path, count in zip(paths, counts, strict=True))
            raise DataError(f"unequal numbers of lines: {totals}; give one line for each line of the input")
        others = iter(columns[1:])
        yield Chunk(first, lines, None if reference is None else next(others), None if prefix is None else next(others))
        first += len(lines)


def read_chunks(path: str, chunk_lines: int) -> Iterator[list[str]]:
    """The lines of a file, or of standard input for `-`, some at a time, without their ends."""
    name = input_name(path)
    with open_lines(path) as stream:
        first = 1
        while raw := list(islice(stream, chunk_lines)):
            yield [decode_line(line, name, number) for number, line in enumerate(raw, first)]
            first += len(raw)


@contextmanager
def open_output(path: str) -> Iterator[TextIO]:
    """Standard output for `-`, a pipe or a device as it is; else a file that is renamed to `path` when the block ends well.

    DataError if that fails.
    """
    if path == STANDARD:
        yield standard_output()
        sys.stdout.flush()
        return
    if is_stream(Path(path)):  # a rename would put a file in the place of a pipe, or of /dev/null
        with named_if_full(Path(path)), Path(path).open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
        return
    partial = partial_path(path)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as out:
            yield out
        sync(partial)
        partial.replace(Path(path).resolve())
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
    """Where answers wait until all are there: beside the file that `path` leads to."""
    return Path(f"{Path(path).resolve()}.partial")


def count_lines(path: str) -> int | None:
    """How many lines a plain file has, for a progress bar; None if that would cost decompression or waiting."""
    if path == STANDARD or not Path(path).is_file():
        return None
    with Path(path).open("rb") as stream:
        if compression_of(stream.peek(HEAD_BYTES)):
            return None
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
