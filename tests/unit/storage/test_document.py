"""A document is read back as it was written; a fault is one message with file, field, value and remedy."""

from pathlib import Path

import pytest

from dstrain.config_base import Config
from dstrain.errors import DataError
from dstrain.storage.document import Count, DocumentFormat, FileRecord
from dstrain.storage.hashing import sha256_of_text


class Toy(Config):
    format: int
    step: Count
    files: tuple[FileRecord, ...] = ()


FORMAT = DocumentFormat(Toy, "toy", DataError, "make it again", version_field="format")


@pytest.mark.parametrize("name", ["toy.json", "toy.yaml"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    record = FileRecord(file="a/b.bin", size=4, sha256=sha256_of_text("data"))
    document = Toy(format=1, step=3, files=(record,))
    FORMAT.write(tmp_path / name, document)
    assert FORMAT.read(tmp_path / name) == document
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"format": 2, "step": 1}',
            r"has format 2, this dstrain reads 1; use the version that wrote it, or make it again",
        ),
        ('{"format": 1}', r"toy.json is not a valid toy: step: missing; give it a value; make it again"),
        ('{"format": 1, "step": -1}', r"step: input should be greater than or equal to 0, not -1; make it again"),
        ('{"format": 1, "step": "12"}', r"step: input should be a valid integer, not '12'"),
        ('{"format": 1, "step": true}', r"step: input should be a valid integer, not true"),
        ('{"format": 1, "step": 1, "stop": 2}', r"stop: unknown key; did you mean step\?"),
        ("[1]", r"holds no mapping of fields but \[1\]"),
        ("", r"toy.json is not valid JSON \(the file is empty\): it was altered; make it again"),
        ("{", r"toy.json is not valid JSON \(Expecting property name"),
    ],
)
def test_a_fault_names_file_field_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "toy.json").write_text(text)
    with pytest.raises(DataError, match=message):
        FORMAT.read(tmp_path / "toy.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", ".", "a//b", "a\\b", "a\0b"])
def test_a_file_name_cannot_leave_its_directory(name: str) -> None:
    with pytest.raises(ValueError, match="let it name a file in the directory"):
        FileRecord(file=name, size=0, sha256="0" * 64)


def test_a_link_cannot_leave_the_directory(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("data")
    (inside / "link").symlink_to(tmp_path / "secret")
    record = FileRecord(file="link", size=4, sha256=sha256_of_text("data"))
    with pytest.raises(DataError, match=r"link leads out of .*inside through a symbolic link, to .*secret; prepare"):
        record.check(inside, content=True)
    (inside / "link").unlink()
    (inside / "link").write_text("data")
    assert record.check(inside, content=True) == inside / "link"
