import gzip
from pathlib import Path

import pytest

from dstrain.data.sources.text import read_lines
from dstrain.errors import DataError


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\n\n b \n", ["a", "", " b "]),
        (b"\xef\xbb\xbfa\r\nb\x0cc\r\n", ["a", "b\x0cc"]),
        ("ein\u2028Hund\n".encode(), ["ein\u2028Hund"]),
    ],
)
@pytest.mark.parametrize("name", ["plain.txt", "packed.gz"])
def test_lines_end_at_line_feeds_only(tmp_path: Path, content: bytes, lines: list[str], name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_lines(path) == lines


def test_invalid_text_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"a\nb\xff\n")
    with pytest.raises(DataError, match=r"bad\.txt:2: invalid UTF-8"):
        read_lines(path)
