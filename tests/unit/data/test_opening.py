"""Text is opened by its first bytes: compressed with any name, from a pipe, and refused by name if it is something else."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstrain.data.sources.opening import open_lines, require_different_streams, require_file
from dstrain.data.sources.text import BlockReader, decode_line, decode_lines, read_lines, scan_file
from dstrain.errors import DataError
from tests.unit.data.corpus import sentences

LINES = [f"{sentence} {number * number}" for number, sentence in enumerate(sentences(3000))]
TEXT = "\n".join(LINES).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd}


@pytest.mark.parametrize("name", ["train.en", "train.en.gz"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_text_is_known_by_its_first_bytes(tmp_path: Path, compression: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS[compression](TEXT))
    assert scan_file(path).lines == len(LINES)
    assert read_lines(path) == LINES
    with BlockReader([path], 2990) as reader:
        assert decode_lines(reader.read(99), 0) == LINES[2990:]


@pytest.mark.parametrize("compression", COMPRESS)
def test_pieces_that_were_compressed_alone_are_one_text(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "pieces"
    path.write_bytes(COMPRESS[compression](b"one\n") + COMPRESS[compression](b"two\n"))
    assert read_lines(path) == ["one", "two"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_damaged_file_is_never_a_shorter_text(tmp_path: Path, compression: str) -> None:
    path, whole = tmp_path / "train.en", COMPRESS[compression](TEXT)
    for content in (whole[:-9], whole[: len(whole) // 2], whole[:12]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"train\.en: the {compression} file is truncated; fetch or compress it again"):
            read_lines(path)
    path.write_bytes(whole[:40] + bytes(40) + whole[80:])
    with pytest.raises(DataError, match=rf"train\.en: not a whole {compression} file \(.*\); fetch or compress it again"):
        scan_file(path)


@pytest.mark.parametrize("compression", COMPRESS)
def test_what_follows_compressed_text_is_not_passed_over(tmp_path: Path, compression: str) -> None:
    path, whole = tmp_path / "train.en", COMPRESS[compression](TEXT)
    path.write_bytes(whole + b"a line that was appended\n")
    with pytest.raises(DataError, match=rf"train\.en: not a whole {compression} file \(.*\); fetch or compress it again"):
        scan_file(path)


@pytest.mark.parametrize("suffix", ["bz2", "xz", "zst"])
def test_a_name_that_promises_compression_is_kept_to_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(b"plain text\n")
    with pytest.raises(DataError, match=rf"train\.{suffix}: not a whole .* file"):
        read_lines(path)
    path.write_bytes(b"")
    assert read_lines(path) == []


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.en", "a text\n")


def tar_file(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, "train.en")


def lines_in(encoding: str) -> Callable[[Path], None]:
    return lambda path: path.write_text("ein Hund\nzwei Hunde\n", encoding=encoding) and None


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "zip": (zip_file, "a zip archive; unpack it and name the file inside"),
    "tar.gz": (tar_file, "a tar archive; unpack it and name the file inside"),
    "parquet": (
        lambda path: pq.write_table(pa.table({"a": ["text"]}), path),
        r"a parquet file; .* \{kind: parquet, path: FILE, ",
    ),
    "utf-16": (lines_in("utf-16"), "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
    "utf-16-be": (lines_in("utf-16-be"), "UTF-16 text; convert it: iconv -f UTF-16BE -t UTF-8"),
    "utf-16-le": (lines_in("utf-16-le"), "UTF-16 text; convert it: iconv -f UTF-16LE -t UTF-8"),
    "utf-32": (lines_in("utf-32"), "UTF-32 text; convert it"),
    "gz.gz": (lambda path: path.write_bytes(gzip.compress(gzip.compress(b"a"))), "compressed by gzip; decompress it first"),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        "a Git LFS pointer, .* git lfs pull",
    ),
    "pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n%\xe2\xe3\n"), "a PDF document; extract its text"),
    "arrow": (lambda path: path.write_bytes(b"ARROW1\0\0" + bytes(99)), "an Arrow file; .*kind: huggingface"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_text_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    write, message = FOREIGN[kind]
    path = tmp_path / "train.en"
    write(path)
    with pytest.raises(DataError, match=rf"train\.en: {message}"):
        scan_file(path)
    with pytest.raises(DataError, match=rf"train\.en: {message}"):
        read_lines(path)


@pytest.mark.parametrize("text", ["PK is a team .", "BZh9 1AY", "PAR1 and PAR2", "%PDF- is a mark", "P*M", "BZhé", "]x"])
def test_text_is_not_taken_for_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert read_lines(tmp_path / "file") == [text]


def test_compressed_lines_of_a_pipe_that_answers_line_by_line_are_named() -> None:
    with pytest.raises(DataError, match=r"standard input: compressed by gzip; decompress it first"):
        decode_line(gzip.compress(b"a"), "standard input", 1)
    with pytest.raises(DataError, match=r"standard input:2: invalid UTF-8"):
        decode_line(b"\xff\xfe", "standard input", 2)


def write_slowly(path: Path, content: bytes) -> threading.Thread:
    """A writer of a named pipe that hands over its first bytes one by one."""

    def write() -> None:
        with path.open("wb", 0) as pipe:
            for part in [*(content[n : n + 1] for n in range(20)), content[20:]]:
                pipe.write(part)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.mark.timeout(30)
@pytest.mark.parametrize("compress", [bytes, *COMPRESS.values()])
def test_a_pipe_is_read_like_a_file(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = write_slowly(tmp_path / "pipe", compress(TEXT))
    with open_lines(tmp_path / "pipe") as stream:
        assert stream.read() == TEXT
    writer.join()


def test_standard_input_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(b"\xef\xbb\xbfa\r\nb"))))
    assert read_lines("-") == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\xff\n")))
    with pytest.raises(DataError, match=r"standard input:2: invalid UTF-8"):
        read_lines("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match=r"standard input is closed; name a file"):
        read_lines("-")


def test_one_stream_serves_one_option(tmp_path: Path) -> None:
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    file.touch()
    require_different_streams({"--input": file, "--reference": file, "--prefix": None})
    require_different_streams({"--input": "-", "--reference": pipe, "--prefix": tmp_path / "absent"})
    with pytest.raises(
        DataError, match=r"--input and --prefix both read standard input, which can be read only once; name a file"
    ):
        require_different_streams({"--input": "-", "--reference": None, "--prefix": "-"})
    with pytest.raises(DataError, match=r"--input and --reference both read .*link, which can be read only once"):
        require_different_streams({"--input": pipe, "--reference": tmp_path / "link"})


def test_what_is_read_several_times_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("-"), Path("/dev/stdin"), Path("/dev/fd/63"), Path("/proc/self/fd/0")):
        with pytest.raises(DataError, match=rf"{path}: a stream is read only once, .*; write it to a file and name that"):
            require_file(path)
    assert require_file(tmp_path) == tmp_path
    assert require_file(tmp_path / "absent") == tmp_path / "absent"
