import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest, write_data_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.data.prepared.rows import Rows, id_dtype
from dstrain.data.prepared.shard import ShardWriter, list_array, read_shard, shard_schema, write_lengths
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers, save_tokenizers
from dstrain.errors import DataError
from dstrain.storage import document, mapped_shards
from dstrain.storage.atomic import atomic_writer
from dstrain.storage.document import FileRecord
from dstrain.storage.hashing import sha256_of_file
from tests.unit.data.corpus import data_config, parallel, sentences


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training pairs in three shards, five validation pairs."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(data_config(folder, pairs_per_shard=100), folder / "data", workers=1)
    return folder / "data"


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    for path in prepared.rglob("*"):
        target = tmp_path / "data" / path.relative_to(prepared)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    return tmp_path / "data"


def random_rows(count: int, seed: int, dtype: np.dtype[Any], *, with_text: bool = False) -> tuple[Rows, list[list[int]]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (2, count)).astype(np.int32)
    values = [rng.integers(0, 60_000, lengths[side].sum()).astype(dtype) for side in range(2)]
    texts = [[f"{side} {row} ü" for row in range(count)] if with_text else None for side in "st"]
    lists = [row.tolist() for row in np.split(values[0], np.cumsum(lengths[0]))[:count]]
    return Rows(values[0], lengths[0], values[1], lengths[1], *texts), lists


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8000, np.uint16), (65_536, np.uint16), (65_537, np.int32)])
def test_rows_come_back_across_record_batches(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    kind = id_dtype(vocab_size)
    assert kind == dtype
    parts = [random_rows(count, count, kind, with_text=True) for count in (10_000, 1, 7_000, 0, 5)]
    path = tmp_path / "shard.arrow"
    with atomic_writer(path) as sink:
        writer = ShardWriter(sink, shard_schema(kind, kind, with_text=True), unk_ids=(3, 3))
        for rows, _ in parts:
            writer.add(rows, [(0, len(rows.source_lengths))])
        record = writer.finish("shard.arrow")
    batches = read_shard(path)
    assert [len(batch.source.offsets) - 1 for batch in batches] == [10_001, 7_005]
    found = [batch.source.row(row).tolist() for batch in batches for row in range(len(batch.source.offsets) - 1)]
    assert found == [row for _, lists in parts for row in lists]
    assert batches[0].source.values.dtype == kind
    assert batches[1].target_text[7_004].as_py() == "t 4 ü"
    assert (record.rows, record.source_tokens, record.size) == (17_006, sum(map(len, found)), path.stat().st_size)


def test_reading_does_not_import_pandas(prepared: Path) -> None:
    read = "import sys; from pathlib import Path; from dstrain.data.prepared.shard import read_shard"
    code = f"{read}; print(len(read_shard(Path(sys.argv[1]))), 'pandas' in sys.modules)"
    shard = next(prepared.glob("train/*.arrow"))
    assert subprocess.run([sys.executable, "-c", code, shard], check=True, stdout=subprocess.PIPE).stdout == b"1 False\n"


def test_a_shard_is_an_arrow_file_that_others_read(prepared: Path) -> None:
    table = pa.ipc.open_file(pa.OSFile(str(prepared / "valid/00000.arrow"))).read_all()
    tokenizers = load_tokenizers(prepared / "tokenizer")
    assert table.column_names == ["source", "target", "source_text", "target_text"]
    assert table["source_text"].to_pylist() == sentences(5)
    assert table["source"].to_pylist() == [[*row, 2] for row in tokenizers.source.encode(sentences(5))]
    assert pa.ipc.open_file(str(prepared / "train/00000.arrow")).schema.names == ["source", "target"]


def test_rows_are_views_of_the_mapped_file(prepared: Path) -> None:
    before = pa.total_allocated_bytes()
    data = open_dataset(prepared, "train")
    row = data[150].source
    assert not row.flags.owndata
    assert not row.flags.writeable
    assert pa.total_allocated_bytes() == before


def test_the_dataset_is_the_corpus(prepared: Path) -> None:
    data, tokenizers = open_dataset(prepared, "train"), load_tokenizers(prepared / "tokenizer")
    assert len(data) == 300
    assert [data[row].source.tolist() for row in range(300)] == [[*ids, 2] for ids in tokenizers.source.encode(sentences(300))]
    assert [data[row].target.tolist() for row in range(300)] == [
        [*ids, 2] for ids in tokenizers.target.encode(sentences(300, suffix="en"))
    ]
    assert data.source_lengths.dtype == data.target_lengths.dtype == np.int32
    assert data.source_lengths.tolist() == [len(data[row].source) for row in range(300)]
    assert data.target_lengths.tolist() == [len(data[row].target) for row in range(300)]
    assert data[np.int64(7)].source.tolist() == data[7].source.tolist()


def test_texts_of_evaluation_splits(prepared: Path) -> None:
    data = open_dataset(prepared, "valid")
    assert [data.source_text(row) for row in range(5)] == sentences(5)
    assert [data.target_text(row) for row in range(5)] == sentences(5, suffix="en")
    with pytest.raises(DataError, match="a training split keeps no raw text"):
        open_dataset(prepared, "train").source_text(0)


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside_are_refused(prepared: Path, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of a data set of 5"):
        open_dataset(prepared, "valid")[row]


def test_lengths_are_mapped_and_come_from_offsets_only(prepared: Path, tmp_path: Path) -> None:
    data = open_dataset(prepared, "train")
    base: Any = data.source_lengths
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    shards = [prepared / shard.file for shard in load_manifest(prepared).splits["train"].shards]
    with atomic_writer(tmp_path / "lengths.npy") as sink:
        write_lengths(shards, 300, sink)
    assert np.load(tmp_path / "lengths.npy").tolist() == [data.source_lengths.tolist(), data.target_lengths.tolist()]


def test_an_unknown_split_names_the_known(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"has no split 'test'; it holds train, valid"):
        open_dataset(prepared, "test")


def truncate(content: bytes) -> bytes:
    return content[:-1]


def lengthen(content: bytes) -> bytes:
    return content + b"\0"


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("file", ["train/00001.arrow", "train/lengths.npy"])
@pytest.mark.parametrize(
    ("damage", "message"), [(truncate, "truncated or altered"), (lengthen, "truncated or altered"), (flip, "SHA-256 differs")]
)
def test_a_damaged_file_is_named(copy: Path, file: str, damage: Callable[[bytes], bytes], message: str) -> None:
    (copy / file).write_bytes(damage((copy / file).read_bytes()))
    with pytest.raises(DataError, match=rf"{file}.*{message}.*prepare the data again"):
        open_dataset(copy, "train")


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "train/00002.arrow").unlink()
    with pytest.raises(DataError, match=r"train/00002\.arrow: No such file or directory; the manifest lists this file"):
        open_dataset(copy, "train")


def test_damage_in_one_split_leaves_the_others(copy: Path) -> None:
    (copy / "train/00002.arrow").unlink()
    assert len(open_dataset(copy, "valid")) == 5


def test_a_large_split_is_checked_shard_by_shard_when_it_is_touched(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = copy / "train/00001.arrow"
    shard.write_bytes(flip(shard.read_bytes()))
    read: list[str] = []
    monkeypatch.setattr(document, "sha256_of_file", lambda path: (read.append(path.name), sha256_of_file(path))[1])
    monkeypatch.setattr(mapped_shards, "ALWAYS_HASHED_SHARDS", 2)
    data = open_dataset(copy, "train")
    assert (len(data), read) == (300, ["lengths.npy"])
    assert (len(data[99].source), len(data[299].source)) == (data.source_lengths[99], data.source_lengths[299])
    assert data[0].source.tolist() == data[0].source.tolist()
    assert read == ["lengths.npy", "00000.arrow", "00002.arrow"]
    for _ in range(2):  # and is not mapped the second time either
        with pytest.raises(DataError, match=r"train/00001.arrow: the SHA-256 differs .*; prepare the data again"):
            data.read(1, np.array([150]))
    with pytest.raises(DataError, match="SHA-256 differs"):
        open_dataset(copy, "train", verify=True)


def test_few_shards_stay_mapped_without_open_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counts() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().splitlines()
        files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        mapped, opened = (sum(line.endswith(".arrow") and str(copy) in line for line in lines) for lines in (maps, files))
        return mapped, opened

    monkeypatch.setattr(mapped_shards, "MAX_OPEN_SHARDS", 2)
    data = open_dataset(copy, "train")
    assert [data[row].source[-1] for row in range(0, 300, 50)] == [2] * 6
    assert counts() == (2, 0)
    rows = [data[row].source for row in (0, 100, 200)]
    assert counts() == (3, 0)  # what is still referred to stays
    assert [len(row) for row in rows] == data.source_lengths[[0, 100, 200]].tolist()


def test_a_shard_that_is_no_arrow_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(b"ARROW1\0\0 but not really ARROW1")
    with pytest.raises(DataError, match=r"x\.arrow cannot be read as a shard"):
        read_shard(tmp_path / "x.arrow")


def test_another_tokenizer_in_the_directory_is_refused(copy: Path, tmp_path: Path) -> None:
    config = data_config(
        tmp_path,
        train=[parallel(tmp_path, "other", sentences(50), sentences(50))],
        tokenizer={"kind": "sentencepiece", "vocab_size": 40},
    )
    prepare(config, tmp_path / "other", workers=1)
    other = load_tokenizers(tmp_path / "other/tokenizer")
    save_tokenizers(TokenizerPair(other.source, other.target), copy / "tokenizer")
    with pytest.raises(DataError, match=r"data/tokenizer is not the tokenizer that made the ids"):
        open_dataset(copy, "train")


def test_data_of_another_tokenizer_is_refused_for_its_user(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    manifest.require_tokenizer(load_tokenizers(prepared / "tokenizer").fingerprint, "RUN")
    with pytest.raises(DataError, match=r"the data was prepared with tokenizer .*, BUNDLE has 0123: .* tokenizer of BUNDLE"):
        manifest.require_tokenizer("0123", "BUNDLE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "has format_version 2, this dstrain reads 1"),
        (
            lambda text: text.replace('"pairs_read": 300', '"pairs_raed": 300'),
            r"splits\.train\.pairs_read: missing; give it a value",
        ),
        (lambda text: text[:-20], "is not valid JSON"),
        (lambda text: "[]", r"holds no mapping of fields but \[\]"),
    ],
)
def test_a_bad_manifest_is_refused(copy: Path, change: Callable[[str], str], message: str) -> None:
    path = copy / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=rf"manifest\.json.*{message}"):
        load_manifest(copy)


def test_an_unfinished_or_absent_directory_says_so(tmp_path: Path) -> None:
    (tmp_path / "job.json").touch()
    with pytest.raises(
        DataError, match=r"manifest\.json is missing: the preparation was not finished; run the same `dstrain prepare"
    ):
        load_manifest(tmp_path)
    with pytest.raises(DataError, match=r"none/manifest\.json is missing, .*none was never prepared: there is no such directory"):
        load_manifest(tmp_path / "none")


def with_lengths(directory: Path, lengths: np.ndarray) -> None:
    """Put other lengths beside the shards of `train`, and into the manifest."""
    path, manifest = directory / "train/lengths.npy", load_manifest(directory)
    np.save(path, lengths)
    record = FileRecord(file="train/lengths.npy", size=path.stat().st_size, sha256=sha256_of_file(path))
    train = manifest.splits["train"].model_copy(update={"lengths": record})
    write_data_manifest(manifest.model_copy(update={"splits": {**manifest.splits, "train": train}}), directory)


def test_inconsistent_lengths_are_refused(copy: Path) -> None:
    lengths = np.load(copy / "train/lengths.npy")
    with_lengths(copy, lengths[:, 1:])
    with pytest.raises(DataError, match=r"lengths.npy describes 299 pairs, the manifest says 300; prepare the data again"):
        open_dataset(copy, "train")
    lengths[1, 150] += 1
    with_lengths(copy, lengths)
    with pytest.raises(DataError, match=r"00001.arrow holds pairs of other lengths than lengths.npy says; prepare"):
        open_dataset(copy, "train")


def test_a_column_beyond_its_offsets_is_refused() -> None:
    lengths = [np.array([2**30, 2**30 - 1], np.int32), np.array([1], np.int64)]
    with pytest.raises(DataError, match=r"3 rows have 2,147,483,648 items, .* at most 2,147,483,647: make smaller shards"):
        list_array([np.zeros(0, np.uint16)], lengths)
    assert len(list_array([np.zeros(3, np.uint16)], [np.array([2, 1])])) == 2
