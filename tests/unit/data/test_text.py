import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.config import JsonlText, ParallelText, TsvText
from dstrain.data.sources import text
from dstrain.data.sources.corpora import files_of, parse, read_blocks
from dstrain.data.sources.text import BlockReader, TextBlock, decode_lines, expand_path, read_lines, scan_file, scan_tsv
from dstrain.errors import DataError
from tests.unit.data.corpus import write_lines

EXOTIC = "a\x0bb\x0cc\x1cd\x1ee\x85f\u2028g\u2029h"
"""Everything that str.splitlines would cut."""


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def all_lines(path: Path, start: int = 0) -> list[str]:
    total = scan_file(path).lines
    found: list[str] = []
    with BlockReader([path], start) as reader:
        while start + len(found) < total:
            found += decode_lines(reader.read(total - start - len(found)), 0)
    return found


@pytest.mark.parametrize("name", ["text", "text.gz"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
        (b"\n\n\n", ["", "", ""]),
        (b"\xef\xbb\xbfone\ntwo", ["one", "two"]),
        (b"a\rb\nc", ["a\rb", "c"]),
        (f"{EXOTIC}\nend".encode(), [EXOTIC, "end"]),
        (b"", []),
    ],
)
def test_a_line_ends_at_newline_only(tmp_path: Path, name: str, content: bytes, lines: list[str]) -> None:
    path = write(tmp_path / name, content)
    assert scan_file(path).lines == len(lines)
    assert all_lines(path) == lines


@settings(max_examples=30, deadline=None)
@given(
    lines=st.lists(st.text(st.characters(exclude_characters="\n\r\0\ufeff", exclude_categories=["Cs"])), max_size=30),
    start=st.integers(0, 30),
)
def test_any_lines_come_back_from_any_start(tmp_path_factory: pytest.TempPathFactory, lines: list[str], start: int) -> None:
    path = write_lines(tmp_path_factory.mktemp("text") / "file", lines)
    assert all_lines(path, min(start, len(lines))) == lines[start:]


def test_blocks_are_cut_by_bytes_and_by_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "file", ["x" * 99] * 10)
    monkeypatch.setattr(text, "MAX_BLOCK_BYTES", 250)
    with BlockReader([path]) as reader:
        assert [reader.read(10).num_lines, reader.read(2).num_lines, reader.read(10).first] == [3, 2, 5]


def test_blocks_do_not_cross_corpora_or_shards(tmp_path: Path) -> None:
    sources = [
        ParallelText(source=str(path), target=str(path))
        for path in (write_lines(tmp_path / f"{n}", ["x"] * n) for n in (5, 0, 4))
    ]
    blocks = list(read_blocks("train", sources, [5, 0, 4], 1, 3))
    assert [(block.corpus, block.text.first, block.text.num_lines) for block in blocks] == [
        (0, 1, 2),
        (0, 3, 2),
        (2, 0, 1),
        (2, 1, 3),
    ]


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "a", ["x", "y"]), write_lines(tmp_path / "b", ["x"])
    with BlockReader([source, target]) as reader, pytest.raises(DataError, match=r"/b has become shorter .* --overwrite"):
        reader.read(2)


@pytest.mark.parametrize("name", ["text", "text.gz"])
def test_invalid_utf8_names_file_and_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"fine\n" * 700 + b"caf\xe9\nfine\n")
    with pytest.raises(DataError, match=rf"{name}:701: invalid UTF-8 \(byte 0xe9\); convert the file to UTF-8"):
        scan_file(path)


@pytest.mark.parametrize("content", [b"\xed\xa0\x80\n", b"\xc0\xaf\n", b"\xf8\x88\x80\x80\x80\n", b"ok\xe2\x82"])
def test_ill_formed_utf8_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"file:1: invalid UTF-8"):
        scan_file(write(tmp_path / "file", content))


def test_a_nul_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text:3: a NUL character; remove it"):
        scan_file(write(tmp_path / "text", b"a\nb\nc\0d\n"))


@pytest.mark.parametrize("content", [b"a\rb\r", b"\xc3\xa9\rb"])
def test_carriage_returns_alone_end_no_lines(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "text", content)
    for read in (scan_file, read_lines):
        with pytest.raises(DataError, match=r"text: its lines end in \\r, not in \\n; convert it: tr "):
            read(path)


def test_lines_are_counted_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SCAN_BYTES", 7)
    path = write(tmp_path / "text", "äöü äöü\n".encode() * 100 + b"\xff\n")
    with pytest.raises(DataError, match=r"text:101: invalid UTF-8"):
        scan_file(path)
    path.write_bytes("äöü äöü\n".encode() * 100)
    assert scan_file(path).lines == 100


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-20], "the gzip file is truncated"),
        (lambda content: content[:30] + bytes([content[30] ^ 0xFF]) + content[31:], "not a whole gzip file"),
        (lambda content: b"plain text\n", "not a whole gzip file"),
        (lambda content: content[:-6] + b"\0\0" + content[-4:], "not a whole gzip file"),
    ],
)
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(damage(gzip.compress("".join(f"line {n} {n * n}\n" for n in range(5000)).encode())))
    with pytest.raises(DataError, match=rf"text\.gz: {message}"):
        scan_file(path)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/none: No such file or directory; check the path"):
        scan_file(tmp_path / "none")
    with pytest.raises(DataError, match=r": Is a directory; check the path"):
        scan_file(tmp_path)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"/secret\.en: Permission denied; check the path"):
        scan_file(tmp_path / "secret.en")


def test_variables_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTRAIN_DATA", "/corpora")
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert expand_path("${DSTRAIN_DATA}/a/${DSTRAIN_DATA}.en") == Path("/corpora/a//corpora.en")
    monkeypatch.setenv("HOME", "/home/a")
    assert expand_path("$HOME/x/$DSTRAIN_DATA.de") == Path("/home/a/x/corpora.de")
    assert expand_path("~/x") == Path("/home/a/x")
    assert expand_path("a$1") == Path("a$1")
    with pytest.raises(DataError, match=r"\$NO_SUCH/x: the environment variable NO_SUCH is not set; set it"):
        expand_path("$NO_SUCH/x")
    with pytest.raises(DataError, match=r"\$\{NO_SUCH\}/x: the environment variable NO_SUCH is not set; set it"):
        expand_path("${NO_SUCH}/x")


def block_of(content: str, first: int = 0) -> TextBlock:
    return TextBlock(first, content.count("\n"), (content.encode(),))


def test_tsv_columns() -> None:
    source = TsvText(path="/corpus.tsv", source_column=2, target_column=0)
    assert files_of(source) == (Path("/corpus.tsv"),)
    assert parse(source, block_of("eins\tx\tone\r\nzwei\t\ttwo\tmore\n\t\t\n")) == (["one", "two", ""], ["eins", "zwei", ""])
    with pytest.raises(DataError, match=r"/corpus\.tsv:12: 2 tab-separated columns, column 2 \(counted from 0\) is missing"):
        parse(source, block_of("a\tb\tc\na\tb\n", first=10))


@pytest.mark.parametrize(
    ("line", "columns"),
    [("a\tb\tc", 3), ("a b", 1), ("", 1)],
)
def test_a_line_with_other_columns_than_the_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, columns: int
) -> None:
    monkeypatch.setattr(text, "SCAN_BYTES", 50)
    path = write_lines(tmp_path / "pairs.tsv", ["x\ty"] * 40 + [line] + ["x\ty"] * 9)
    cause = "hold a tab inside a sentence" if columns > 2 else "lack a tab"
    with pytest.raises(DataError, match=rf"pairs\.tsv:41: {columns} tab-separated columns, line 1 has 2; .*: it may {cause}"):
        scan_tsv(path)
    assert scan_tsv(write_lines(path, ["\t", "x\ty", "\t"])).lines == 3


@pytest.mark.parametrize(
    ("line", "warned"),
    [
        ('"he said ""no"""\t"x"', True),
        ('x\t"""no"" he said"\r', True),
        ('"he said "no""\tx', False),
        ('"he"\t"said"', False),
        ('""\t"" a', False),
    ],
)
def test_fields_quoted_as_in_csv_are_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, line: str, warned: bool
) -> None:
    monkeypatch.setattr(text, "SCAN_BYTES", 10)
    path = write_lines(tmp_path / "pairs.tsv", ["x\ty", line, line])
    assert scan_tsv(path).lines == 3
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [f"{path}:2"] * warned


def test_a_header_is_no_pair() -> None:
    source = TsvText(path="/corpus.tsv", header=True)
    assert parse(source, block_of("one\teins\n", first=1)) == (["one"], ["eins"])


def test_jsonl_fields() -> None:
    source = JsonlText(path="/corpus.jsonl", source="document", target="summary")
    lines = '{"document": "a\\nb \\ud83d\\ude00", "summary": "c", "other": [1]}\n{"summary": "", "document": "ü"}\n'
    assert parse(source, block_of(lines)) == (["a\nb 😀", "ü"], ["c", ""])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "a", "target": "b"', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1, 2]", "a JSON list, not an object"),
        ('{"source": "a"}', "no field 'target'; the fields are 'source'"),
        ("{}", "no field 'source'; the fields are none"),
        ('{"source": ["a", "b"], "target": "c"}', "field 'source' holds a list, not a string"),
        ('{"source": "a", "target": null}', "field 'target' holds null, not a string"),
        ('{"source": "a\\u0000", "target": "b"}', "field 'source' holds a NUL or half of a surrogate pair"),
        ('{"source": "a", "target": "\\ud800"}', "field 'target' holds a NUL or half of a surrogate pair"),
        ("[" * 100_000, "not valid JSON"),
        ('{"source": "a", "source": "b", "target": "c"}', r"not valid JSON \(the key 'source' is given twice\)"),
    ],
)
def test_a_bad_json_line_is_named(line: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"/corpus\.jsonl:6: {message}"):
        parse(JsonlText(path="/corpus.jsonl"), block_of(f'{{"source": "", "target": ""}}\n{line}\n', first=4))
