"""An output is never an input, by whatever name, and replaces nothing without being asked to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.errors import StorageError
from dstrain.storage.outputs import check_output, check_output_file, check_output_path

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


def test_an_output_is_no_url() -> None:
    with pytest.raises(StorageError, match=r"--output s3:/bucket/run is a URL, and only --data may be one; write to a directory"):
        check_output_path(Path("s3://bucket/run"), {})


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
        check_output_path(outer, {"--base": text})
    check_output_path(tmp_path / "beside", {"--base": text})


def test_a_part_of_an_input_is_no_output(tmp_path: Path) -> None:
    bundle, run = tmp_path / "bundle", tmp_path / "run"
    for path in (bundle / "model.yaml", run / "events.jsonl", run / "average"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    (tmp_path / "link").symlink_to(bundle)
    for output in (bundle / "model.yaml", tmp_path / "link" / "model.yaml"):
        with pytest.raises(StorageError, match=r"model.yaml is part of BUNDLE \(.*bundle\), which would be lost"):
            check_output_file(output, {"BUNDLE": bundle}, overwrite=True)
    check_output_file(bundle / "new", {"BUNDLE": bundle}, overwrite=False)
    check_output(run / "average", {"RUN": run}, overwrite=True)


def test_an_output_lies_where_it_can_be_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"in.txt/new/b: .*in.txt is a file, not a directory; choose another --output"):
        check_output_path(text / "new" / "b", {})
    with pytest.raises(StorageError, match=r"is a directory; name a file, such as .*NAME"):
        check_output_file(tmp_path, {}, overwrite=True)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match="loop is a link that leads back to itself; choose another --output"):
        check_output_path(tmp_path / "loop", {"--input": text})
    check_output_path(tmp_path / "new" / "b", {})
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    for output in (text, tmp_path / "new" / "b", tmp_path):
        with pytest.raises(StorageError, match=f"{tmp_path} cannot be written; choose another --output"):
            check_output_path(output, {})
    with monkeypatch.context() as other:
        other.setattr(os, "access", lambda path, mode: path == tmp_path)
        check_output_path(tmp_path / "new" / "b", {})


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
