"""Which corpus each row of prepared data is of."""

import json
from pathlib import Path

import numpy as np
import pytest

from dstrain.data.config import DataConfig
from dstrain.data.prepared.corpora import CorpusRanges, merged_runs
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.errors import DataError
from tests.unit.data.corpus import data_config, parallel, sentences


def three_corpora(folder: Path) -> DataConfig:
    """120 + 50 + 30 training pairs, ten of the first without a target."""
    sides = [sentences(size) for size in (120, 50, 30)]
    targets = [["" if row < 10 else line for row, line in enumerate(sides[0])], *sides[1:]]
    train = [parallel(folder, name, *pair) for name, *pair in zip("abc", sides, targets, strict=True)]
    return data_config(folder, train=train, pairs_per_shard=64)


def test_rows_know_their_corpus_across_shards(tmp_path: Path) -> None:
    prepare(three_corpora(tmp_path), tmp_path / "data", workers=1, progress=False)
    record = load_manifest(tmp_path / "data").splits["train"]
    assert [shard.runs for shard in record.shards] == [((0, 54),), ((0, 56), (1, 8)), ((1, 42), (2, 22)), ((2, 8),)]
    assert record.runs() == [(0, 110), (1, 50), (2, 30)]
    data = open_dataset(tmp_path / "data", "train")
    assert data.knows_corpora
    np.testing.assert_array_equal(data.corpus_of(np.arange(190)), np.repeat([0, 1, 2], [110, 50, 30]))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_what_a_manifest_says_of_the_corpora(split: str, tmp_path: Path) -> None:
    prepare(three_corpora(tmp_path), tmp_path / "data", workers=1, progress=False)
    path = tmp_path / "data/manifest.json"
    tree = json.loads(path.read_text())
    if split == "valid":
        tree["splits"]["valid"]["shards"][0]["runs"] = [[0, 2]]
        path.write_text(json.dumps(tree))
        with pytest.raises(DataError, match="the runs of corpora do not add up to its 5 rows"):
            load_manifest(tmp_path / "data")
        return
    for shard in tree["splits"]["train"]["shards"]:  # as an earlier version wrote it
        del shard["runs"]
    path.write_text(json.dumps(tree))
    data = open_dataset(tmp_path / "data", "train")
    assert not data.knows_corpora
    assert not data.corpus_of(np.arange(190)).any()


def test_runs_are_merged_and_looked_up() -> None:
    assert merged_runs([(0, 2), (0, 1), (1, 0), (0, 3), (2, 1), (0, 1)]) == [(0, 6), (2, 1), (0, 1)]
    ranges = CorpusRanges([(0, 2), (1, 1), (0, 3)])
    np.testing.assert_array_equal(ranges.of(np.arange(6)), [0, 0, 1, 0, 0, 0])
    assert (ranges.rows([0]), ranges.rows([1]), ranges.rows([7])) == ([range(2), range(3, 6)], [range(2, 3)], [])
