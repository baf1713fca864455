"""Files in and out: order, chunks, faults, and what stays after a stop."""

from __future__ import annotations

import gzip
import os
import threading
from pathlib import Path

import pytest

from dstrain.errors import DataError, StorageError
from dstrain.generation.files import Chunk, count_lines, read_chunks, translate_file
from dstrain.generation.formats import Answer
from dstrain.generation.generator import TextHypothesis
from dstrain.storage.atomic import write_file


def shout(chunk: Chunk) -> list[list[TextHypothesis]]:
    texts = [f"{number} {line.upper()}" for number, line in enumerate(chunk.lines, chunk.first)]
    return [[TextHypothesis([5, 2], 0.0, [0.0, 0.0], text)] for text in texts]


def render(answer: Answer) -> str:
    reference = "" if answer.reference is None else f" | {answer.reference}"
    return f"{answer.line}: {answer.hypotheses[0].text}{reference}\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffa\r\n\n   \nb\u2028c\nd".encode())
    return path


EXPECTED = ["1: 1 A", "2: 2 ", "3: 3    ", "4: 4 B\u2028C", "5: 5 D"]


@pytest.mark.parametrize("chunk_lines", [1, 2, 5, 100])
def test_every_line_gives_a_line_whatever_the_chunks(source: Path, tmp_path: Path, chunk_lines: int) -> None:
    output = tmp_path / "deep" / "out.txt"
    counted = translate_file(shout, str(source), str(output), render, chunk_lines=chunk_lines)
    assert counted == (5, 10)
    assert output.read_text().split("\n") == [*EXPECTED, ""]
    assert [path.name for path in output.parent.iterdir()] == ["out.txt"]


def test_gzip_is_read_and_an_empty_file_gives_an_empty_file(tmp_path: Path) -> None:
    packed, output = tmp_path / "in.gz", tmp_path / "out"
    packed.write_bytes(gzip.compress(b"x\ny\n"))
    assert translate_file(shout, str(packed), str(output), render) == (2, 4)
    assert output.read_text() == "1: 1 X\n2: 2 Y\n"
    (tmp_path / "empty").touch()
    assert translate_file(shout, str(tmp_path / "empty"), str(output), render) == (0, 0)
    assert output.read_text() == ""


def test_finished_chunks_stay_after_a_stop_and_the_output_is_not_touched(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("of an earlier run\n")

    def interrupted(chunk: Chunk) -> list[list[TextHypothesis]]:
        if chunk.first > 3:
            raise KeyboardInterrupt
        return shout(chunk)

    with pytest.raises(KeyboardInterrupt):
        translate_file(interrupted, str(source), str(output), render, chunk_lines=2)
    assert output.read_text() == "of an earlier run\n", "lines 3 and 4 were finished, but not all"
    assert (tmp_path / "out.partial").read_text().splitlines() == [*EXPECTED[:2], *"\n".join(EXPECTED[2:4]).splitlines()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n\xff\xfe\n", r"in\.txt:3: invalid UTF-8 \(byte 0xff\); convert the file to UTF-8"),
        (b"a\nb\0\n", r"in\.txt:2: a NUL character; remove it"),
    ],
)
def test_a_fault_is_named_by_file_and_line(source: Path, tmp_path: Path, content: bytes, message: str) -> None:
    source.write_bytes(content)
    with pytest.raises(DataError, match=message):
        translate_file(shout, str(source), str(tmp_path / "out"), render, chunk_lines=1)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").read_text().startswith("1: 1 A\n")


def test_a_file_that_cannot_be_read_or_written_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: No such file or directory; check the path"):
        translate_file(shout, str(tmp_path / "none.txt"), str(tmp_path / "out"), render)
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"x\n" * 1000)[:20])
    with pytest.raises(DataError, match=r"broken\.gz: (not a whole gzip file|the gzip file is truncated)"):
        translate_file(shout, str(broken), str(tmp_path / "out"), render)
    assert not (tmp_path / "out.partial").exists(), "nothing was finished"
    with pytest.raises(DataError, match=r"cannot write .*in\.txt/out: Not a directory|File exists"):
        translate_file(shout, str(source), str(source / "out"), render)


@pytest.mark.timeout(30)
def test_a_full_device_is_named(source: Path) -> None:
    with pytest.raises(StorageError, match=r"no space left to write /dev/full"):
        translate_file(shout, str(source), "/dev/full", render)


def test_a_pipe_is_written_as_it_is(source: Path, tmp_path: Path) -> None:
    """A rename would put a file in its place, and in that of /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    translate_file(shout, str(source), str(pipe), render)
    reader.join(20)
    assert received == ["\n".join([*EXPECTED, ""])]
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    write_file(pipe, b"a recipe")
    reader.join(20)
    assert received[1:] == ["a recipe"]
    assert pipe.is_fifo()
    assert not (tmp_path / "pipe.partial").exists()


@pytest.mark.parametrize("chunk_lines", [2, 100])
def test_references_stand_beside_their_lines(source: Path, tmp_path: Path, chunk_lines: int) -> None:
    reference, output = tmp_path / "ref", tmp_path / "out"
    reference.write_text("A\nB\nC\nD\nE\n")
    translate_file(shout, str(source), str(output), render, reference=str(reference), chunk_lines=chunk_lines)
    assert [line[-1] for line in output.read_text().rstrip("\n").split("\n")] == list("ABCDE")


@pytest.mark.parametrize("with_reference", [True, False])
def test_prefixes_reach_their_lines(source: Path, tmp_path: Path, with_reference: bool) -> None:
    prefix, reference = tmp_path / "prefix", str(tmp_path / "ref") if with_reference else None
    prefix.write_text("P\n\nQ\n\nR\n")
    (tmp_path / "ref").write_text("A\nB\nC\nD\nE\n")
    seen: list[Chunk] = []

    def note(chunk: Chunk) -> list[list[TextHypothesis]]:
        seen.append(chunk)
        return shout(chunk)

    translate_file(note, str(source), str(tmp_path / "out"), render, reference=reference, prefix=str(prefix), chunk_lines=2)
    assert [(chunk.first, chunk.prefixes) for chunk in seen] == [(1, ["P", ""]), (3, ["Q", ""]), (5, ["R"])]
    assert [chunk.references for chunk in seen] == ([["A", "B"], ["C", "D"], ["E"]] if with_reference else [None] * 3)


@pytest.mark.parametrize("chunk_lines", [1, 2, 5, 100])
@pytest.mark.parametrize("lines", [0, 3, 7, 30])
@pytest.mark.parametrize("option", ["reference", "prefix"])
def test_files_of_unequal_lengths_are_refused_with_both_counts(
    source: Path, tmp_path: Path, option: str, lines: int, chunk_lines: int
) -> None:
    other = tmp_path / "other"
    other.write_text("r\n" * lines)
    reference, prefix = (str(other) if name == option else None for name in ("reference", "prefix"))
    with pytest.raises(DataError, match=rf"unequal numbers of lines: .*in\.txt 5, .*other {lines}; give one line for each line"):
        translate_file(
            shout, str(source), str(tmp_path / "out"), render, reference=reference, prefix=prefix, chunk_lines=chunk_lines
        )


def test_lines_are_read_some_at_a_time(source: Path) -> None:
    chunks = list(read_chunks(str(source), 2))
    assert chunks == [["a", ""], ["   ", "b\u2028c"], ["d"]]


def test_counting_lines_for_the_bar(source: Path, tmp_path: Path) -> None:
    assert count_lines(str(source)) == 4
    assert count_lines("-") is None
    (tmp_path / "packed").write_bytes(gzip.compress(b"x\ny\n"))
    assert count_lines(str(tmp_path / "packed")) is None
    assert count_lines(str(tmp_path / "none")) is None
