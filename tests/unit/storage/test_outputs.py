"""An output is never an input, by whatever name, and replaces nothing without being asked to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.errors import StorageError
from dstrain.storage.outputs import check_output, refuse_input_as_output

Alias = Callable[[Path, Path], None]


def symbolic(path: Path, link: Path) -> None:
    link.symlink_to(path)


def hard(path: Path, link: Path) -> None:
    link.hardlink_to(path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("a\n")
    return path


@pytest.mark.parametrize("alias", [symbolic, hard])
def test_an_input_is_no_output_through_a_link(alias: Alias, text: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    alias(text, link)
    for output in (text, link, tmp_path / "." / "in.txt"):
        with pytest.raises(StorageError, match="is the same as --input, which would be lost; choose another --output"):
            check_output(output, {"--input": text, "--reference": None}, overwrite=True)


def test_a_directory_that_holds_an_input_is_no_output(text: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.symlink_to(tmp_path)
    with pytest.raises(StorageError, match=r"outer holds --base \(.*in.txt\), which would be lost"):
        refuse_input_as_output(outer, {"--base": text})
    refuse_input_as_output(tmp_path / "beside", {"--base": text})


def test_what_exists_is_replaced_on_request_only(text: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for output in (text, tmp_path / "full"):
        with pytest.raises(StorageError, match=r" exists; add --overwrite to replace it, or choose another --output"):
            check_output(output, {}, overwrite=False)
        check_output(output, {}, overwrite=True)


def test_nothing_is_lost_in_what_is_new_empty_or_a_stream(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("new", "empty", "nothing", "pipe"):
        check_output(tmp_path / name, {}, overwrite=False)
