"""Parquet files and data sets of Hugging Face, read as records."""

from __future__ import annotations

import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstrain.data.config import HuggingFaceDataset, ParquetTable
from dstrain.data.sources import tables
from dstrain.data.sources.corpora import counted_files, files_of, pairs_without_lines, parse, read_blocks, scan_of
from dstrain.errors import DataError, ExtraError
from tests.unit.data.corpus import sentences

SOURCES, TARGETS = sentences(300), sentences(300, suffix="en")
NESTED = {"source": "translation.en", "target": "translation.de"}


def table(**columns: Any) -> Any:
    pairs = [{"en": source, "de": target} for source, target in zip(SOURCES, TARGETS, strict=True)]
    return pa.table({"id": list(range(300)), "translation": pairs, **columns})


def pairs_from(corpus: ParquetTable | HuggingFaceDataset, size: int, start: int = 0) -> list[tuple[str, str]]:
    blocks = list(read_blocks("train", [corpus], [size], start, 90))
    assert [block.text.first for block in blocks][:1] == [start]
    assert all(a.text.first + a.text.num_lines == b.text.first for a, b in pairwise(blocks))
    return [pair for block in blocks for pair in zip(*parse(corpus, block.text), strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0, 1, 69, 70, 141, 299])
@pytest.mark.parametrize("block_bytes", [1, 3000, 1 << 20])
def test_rows_are_read_from_anywhere_across_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, block_bytes: int
) -> None:
    monkeypatch.setattr(tables, "MAX_BLOCK_BYTES", block_bytes)
    path = tmp_path / "pairs.parquet"
    pq.write_table(table(), path, row_group_size=70)
    corpus = ParquetTable(path=str(path), **NESTED)
    assert [scan_of(corpus)(file).lines for file in counted_files(corpus)] == [300]
    assert pairs_from(corpus, 300, start) == list(zip(SOURCES, TARGETS, strict=True))[start:]


def test_only_one_batch_of_a_row_group_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_BLOCK_BYTES", 2000)
    path = tmp_path / "pairs.parquet"
    pq.write_table(table(), path)
    with tables.read_parquet(ParquetTable(path=str(path), **NESTED), 0) as reader:
        assert 1 <= reader.read(300).num_lines <= 60


def test_names_with_dots_lists_and_joins(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    both = [list(pair) for pair in zip(SOURCES, TARGETS, strict=True)]
    pq.write_table(table(**{"text.en": SOURCES, "both": both}), path)
    corpus = ParquetTable(path=str(path), source="text.en", target="both.1")
    assert pairs_from(corpus, 300) == list(zip(SOURCES, TARGETS, strict=True))
    corpus = ParquetTable(path=str(path), source="both", target="both.0", join="\n")
    assert pairs_from(corpus, 300)[7] == (f"{SOURCES[7]}\n{TARGETS[7]}", SOURCES[7])


@pytest.mark.parametrize("wrong", ["translation.fr", "en", "translation.en.x", "translation.0", "id.x"])
def test_a_column_that_is_not_there_lists_the_columns(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(table(), path)
    corpus = ParquetTable(path=str(path), source=wrong, target="id")
    message = rf"pairs\.parquet: no column '{wrong}'; the columns are id, translation\.en, translation\.de"
    for read in (lambda: scan_of(corpus)(path), lambda: tables.read_parquet(corpus, 0)):
        with pytest.raises(DataError, match=message):
            read()


@pytest.mark.parametrize("path", ["text", "text.en"])
def test_a_name_of_two_columns_is_refused(tmp_path: Path, path: str) -> None:
    column = pa.array([{"en": "a"}] if "." in path else ["a"])
    pq.write_table(
        pa.Table.from_arrays([column, column, pa.array(["b"])], names=["text", "text", "other"]), tmp_path / "t.parquet"
    )
    corpus = ParquetTable(path=str(tmp_path / "t.parquet"), source=path, target="other")
    with pytest.raises(DataError, match=r"t\.parquet: it has two columns 'text'; rename one"):
        scan_of(corpus)(tmp_path / "t.parquet")


def test_values_that_are_no_text_are_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"a": ["x", None], "b": [1, 2], "c": pa.array([b"\xff", b""]).cast(pa.string(), safe=False)}), path)
    for source, message in (
        ("a", ":2: field 'a' holds null"),
        ("b", ":1: field 'b' holds a number"),
        ("c", ": .* invalid UTF-8"),
    ):
        with pytest.raises(DataError, match=rf"pairs\.parquet{message}"):
            pairs_from(ParquetTable(path=str(path), source=source, target="a"), 2)


def test_a_file_that_is_no_whole_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(table(), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"pairs\.parquet: not a whole parquet file \(.*\); fetch it again"):
        scan_of(ParquetTable(path=str(path), **NESTED))(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs as `single` and `several` of `save_to_disk`, and as a folder of `parquet` files."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("sets")
    data = datasets.Dataset(table())
    data.save_to_disk(folder / "single")
    datasets.DatasetDict({"train": data, "validation": data.select(range(20))}).save_to_disk(folder / "several")
    (folder / "parquet").mkdir()
    pq.write_table(table(), folder / "parquet/train-0.parquet")
    pq.write_table(table().slice(0, 20), folder / "parquet/validation-0.parquet")
    return folder


@pytest.mark.parametrize(("name", "split"), [("single", None), ("several", "train"), ("parquet", "train")])
def test_a_data_set_on_the_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, split: str | None
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    corpus = HuggingFaceDataset(dataset=str(folder / name), split=split, **NESTED)
    assert pairs_without_lines(corpus) == 300
    assert files_of(corpus)
    assert all(path.is_file() for path in files_of(corpus))
    assert pairs_from(corpus, 300, 80) == list(zip(SOURCES, TARGETS, strict=True))[80:]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": "several"}, "no split is chosen; set split to one of train, validation"),
        ({"dataset": "several", "split": "test"}, "no split test; set split to one of train, validation"),
        ({"dataset": "single", "split": "test"}, "it has one split without a name, not 'test'; leave split out"),
        (
            {"dataset": "parquet/train-0.parquet"},
            r"train-0\.parquet is a file, not a data set; name its folder, or read it by kind",
        ),
        ({"dataset": "single", "source": "en"}, r"no column 'en'; the columns are id, translation\.en, translation\.de"),
        ({"dataset": "absent"}, r"Hugging Face's datasets cannot load it \(FileNotFoundError: .*; check dataset and config"),
    ],
)
def test_what_a_data_set_lacks_is_told_with_what_it_has(folder: Path, keys: dict[str, str], message: str) -> None:
    keys = {**NESTED, **keys, "dataset": str(folder / keys["dataset"])}
    with pytest.raises(DataError, match=message):
        pairs_without_lines(HuggingFaceDataset(**keys))


def test_a_name_of_the_hub_is_read_from_the_cache_of_an_earlier_download(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.load_dataset(str(folder / "parquet"))  # its cache is that of a download, but for the name
    (tmp_path / "parquet").rename(tmp_path / "some___parquet")
    corpus = HuggingFaceDataset(dataset="some/parquet", split="train", **NESTED)
    assert pairs_without_lines(corpus) == 300
    assert pairs_from(corpus, 300, 80) == list(zip(SOURCES, TARGETS, strict=True))[80:]
    with pytest.raises(DataError, match=r"another/set: .*\(ConnectionError: .*\); .* \(with HF_HUB_OFFLINE=1 its cache is read"):
        pairs_without_lines(HuggingFaceDataset(dataset="another/set", **NESTED))


def test_an_absent_network_is_one_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*arguments: object) -> None:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    level = logging.getLogger("huggingface_hub").level
    with pytest.raises(
        DataError, match=r"some/set de-en: .*\(ConnectionError: Couldn't reach the Hub\); .* also the network \(.*, or name"
    ):
        tables.load_data_set(HuggingFaceDataset(dataset="some/set", config="de-en"))
    assert "Retrying" not in caplog.text
    assert logging.getLogger("huggingface_hub").level == level


def test_the_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExtraError, match=r'kind: huggingface needs a package that .*; pip install "dstrain\[hf\]"'):
        tables.load_data_set(HuggingFaceDataset(dataset="some/set"))
