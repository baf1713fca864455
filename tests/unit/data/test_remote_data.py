"""Prepared data in an object store: read like a directory, shard by shard, from a store that fails at any time."""

import shutil
import sys
from pathlib import Path

import fsspec.core
import numpy as np
import pytest

from dstrain.build.training_options import TrainOptions
from dstrain.cli.main import main
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.derived import LabelJob, copy_original
from dstrain.data.prepared.location import data_directory
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.errors import DataError, ExtraError
from dstrain.storage import mapped_shards, remote
from tests.unit.data.corpus import data_config
from tests.unit.storage.flaky_store import FlakyStore, use_store

URL = "flaky://bucket"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(data_config(folder, pairs_per_shard=100), folder / "data", workers=1)
    return folder / "data"


@pytest.fixture
def store(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FlakyStore]:
    """300 training pairs in three shards; a large split, which is read shard by shard."""
    shutil.copytree(prepared, tmp_path / "store/bucket")
    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped_shards, "ALWAYS_HASHED_SHARDS", 2)
    return use_store(tmp_path / "store")


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", seconds.append)
    return seconds


def pairs(data: Dataset, rows: range) -> list[tuple[list[int], list[int]]]:
    return [(pair.source.tolist(), pair.target.tolist()) for pair in data.read(1, np.array(rows))]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and path.parent.name == "train"}


def test_rows_are_those_of_the_directory_and_only_touched_shards_are_fetched(
    store: type[FlakyStore], prepared: Path, tmp_path: Path
) -> None:
    local, data = open_dataset(prepared, "train"), open_dataset(data_directory(URL), "train")
    assert files(tmp_path / "cache") == {"lengths.npy"}
    assert data.target_lengths.tolist() == local.target_lengths.tolist()
    assert pairs(data, range(50, 150)) == pairs(local, range(50, 150))
    assert pairs(data, range(50, 150)) == pairs(local, range(50, 150))
    assert files(tmp_path / "cache") == {"lengths.npy", "00000.arrow", "00001.arrow"}
    again = open_dataset(data_directory(f"{URL}/"), "train")
    assert pairs(again, range(300)) == pairs(local, range(300))
    assert {name: count for name, count in store.requests.items() if name.startswith("train")} == dict.fromkeys(
        ["train/lengths.npy", "train/00000.arrow", "train/00001.arrow", "train/00002.arrow"], 1
    )
    assert open_dataset(data_directory(URL), "valid").source_text(0) == open_dataset(prepared, "valid").source_text(0)


def test_a_store_that_fails_is_asked_again(
    store: type[FlakyStore], prepared: Path, naps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    store.failures["manifest.json"] = ["refused"]
    store.failures["train/00001.arrow"] = ["refused", "halfway", "short", "altered"]
    data = open_dataset(data_directory(URL), "train")
    assert pairs(data, range(100, 200)) == pairs(open_dataset(prepared, "train"), range(100, 200))
    assert naps == [1, 1, 2, 4, 8]
    assert "flaky://bucket/manifest.json: attempt 1 failed with ConnectionRefusedError: no answer; the next one is in 1 s" in (
        caplog.messages
    )
    reasons = [
        "no answer",
        "connection reset by the store",
        "bytes, the manifest says",
        "other bytes than the manifest's SHA-256",
    ]
    said = [text for text in caplog.messages if "00001.arrow: attempt" in text]
    assert len(said) == 4
    assert all(reason in text for reason, text in zip(reasons, said, strict=True))


@pytest.mark.parametrize("failure", ["refused", "halfway", "short", "altered"])
def test_a_store_that_fails_halfway_leaves_whole_files_only(
    store: type[FlakyStore], prepared: Path, tmp_path: Path, naps: list[float], failure: str
) -> None:
    store.failures["train/00001.arrow"] = [failure] * 5
    data = open_dataset(data_directory(URL), "train")
    with pytest.raises(
        DataError, match=r"flaky://bucket/train/00001\.arrow cannot be read: 5 attempts in 0 s failed, .*files that"
    ):
        pairs(data, range(300))
    assert files(tmp_path / "cache") == {"lengths.npy", "00000.arrow"}
    again = open_dataset(data_directory(URL), "train")  # the same command again
    assert pairs(again, range(300)) == pairs(open_dataset(prepared, "train"), range(300))
    assert store.requests["train/00000.arrow"] == 1
    assert len(naps) == 4


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:700] + b"!" + content[701:]])
def test_a_damaged_copy_is_fetched_again(
    store: type[FlakyStore], prepared: Path, tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    pairs(open_dataset(data_directory(URL), "train"), range(300))
    (copy,) = (tmp_path / "cache").rglob("00001.arrow")
    copy.write_bytes(damage(copy.read_bytes()))  # type: ignore[operator]
    assert pairs(open_dataset(data_directory(URL), "train"), range(300)) == pairs(open_dataset(prepared, "train"), range(300))
    assert store.requests["train/00001.arrow"] == 2
    assert any("00001.arrow" in text and text.endswith("it is fetched again") for text in caplog.messages)


def test_shards_leave_the_cache_and_come_back(
    store: type[FlakyStore], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [file.size for file in load_manifest(prepared).splits["train"].files]
    monkeypatch.setenv("DSTRAIN_CACHE_GIB", str((sum(sizes) - min(sizes) / 2) / 2**30))
    monkeypatch.setattr(mapped_shards, "MAX_OPEN_SHARDS", 1)
    data = open_dataset(data_directory(URL), "train")
    local = open_dataset(prepared, "train")
    for _ in range(2):
        for row in (0, 100, 200):
            assert pairs(data, range(row, row + 1)) == pairs(local, range(row, row + 1))
    assert sum(store.requests[f"train/0000{number}.arrow"] for number in range(3)) > 3
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("train/*")) < sum(sizes)


def test_another_manifest_in_the_store_is_another_copy(store: type[FlakyStore], tmp_path: Path) -> None:
    first = data_directory(URL)
    manifest = store.root / "bucket/manifest.json"
    manifest.write_text(manifest.read_text().replace('"created_by": "', '"created_by": "another '))
    second = data_directory(URL)
    assert first != second
    assert load_manifest(second).created_by.startswith("another")
    assert {first, second} == set((tmp_path / "cache").iterdir())


def test_verbs_and_options_take_a_url(
    store: type[FlakyStore], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", URL]) == 0
    assert "300 pairs" in capsys.readouterr().out
    assert main(["text", URL, "--split", "valid", "--output", str(tmp_path / "text")]) == 0
    assert len((tmp_path / "text/source.txt").read_text().splitlines()) == 5
    options = TrainOptions(data=URL, output=tmp_path / "run")  # type: ignore[arg-type]
    assert load_manifest(options.data) == load_manifest(prepared)
    assert TrainOptions(data=prepared, output=tmp_path / "run").data == prepared
    with pytest.raises(DataError, match=r"flaky:/bucket is a URL that lost a slash, as in a Path; give it as a text"):
        TrainOptions(data=Path(URL), output=tmp_path / "run")


def test_what_is_copied_beside_labels_is_fetched(store: type[FlakyStore], prepared: Path, tmp_path: Path) -> None:
    job = LabelJob(
        teacher="t",
        original="o",
        generation={},
        max_ratio=None,
        max_repeats=None,
        keep_original=True,
        pairs=300,
        parts=3,
        pairs_per_part=100,
    )
    copy_original(data_directory(URL), tmp_path / "labeled", job)
    for name, source in (("train/original_00002.arrow", "train/00002.arrow"), ("valid/00000.arrow",) * 2):
        assert (tmp_path / "labeled" / name).read_bytes() == (prepared / source).read_bytes()


def test_what_is_not_there_is_named(store: type[FlakyStore], monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> None:
    with pytest.raises(DataError, match=r"flaky://nowhere/manifest\.json cannot be read \(FileNotFoundError.*correct the URL"):
        data_directory("flaky://nowhere")
    (store.root / "bucket/train/00000.arrow").unlink()
    with pytest.raises(DataError, match=r"train/00000\.arrow cannot be read .* or upload the prepared directory again"):
        pairs(open_dataset(data_directory(URL), "train"), range(1))
    with pytest.raises(DataError, match=r"nothing://bucket is of no store that fsspec knows .*; correct the URL"):
        data_directory("nothing://bucket")
    assert naps == []

    def without_package(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without_package)
    with pytest.raises(
        ExtraError, match=r"s3://bucket needs another package: Install s3fs to access S3; install it beside dstrain"
    ):
        data_directory("s3://bucket")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ExtraError, match=r'reading flaky://bucket needs a package .* pip install "dstrain\[fsspec\]"'):
        data_directory(URL)
