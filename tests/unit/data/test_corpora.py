"""The corpora of prepared data: which rows are whose, their names, and the tags of their directions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dstrain.data.config import DataConfig, corpus_names
from dstrain.data.prepared.corpora import CorpusRanges, NamedCorpora, merged_runs
from dstrain.data.prepared.dataset import named_corpora, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.errors import DataError
from tests.unit.data.corpus import data_config, parallel, sentences


def named_config(folder: Path, **changes: Any) -> DataConfig:
    """120 + 50 + 30 training pairs, ten of the first without a target; the third belongs to the name of the first."""
    first = sentences(120, suffix="x")
    train = [
        parallel(folder, "one", sentences(120), ["" if row < 10 else line for row, line in enumerate(first)]),
        parallel(folder, "two", sentences(50), sentences(50, suffix="y")),
        parallel(folder, "three", sentences(30), sentences(30, suffix="x")),
    ]
    names = ("en-xx", "en-yy", "en-xx")
    valid = [parallel(folder, "valid_x", ["the dog", "", "cat"], ["dogx", "x", "catx"])]
    content = {
        "train": [{**entry, "name": name} for entry, name in zip(train, names, strict=True)],
        "valid": [{**entry, "name": "en-xx"} for entry in valid],
    }
    return data_config(folder, **{**content, **changes})


def test_rows_know_their_corpus_across_shards(tmp_path: Path) -> None:
    prepare(named_config(tmp_path, pairs_per_shard=64), tmp_path / "data", workers=1)
    record = load_manifest(tmp_path / "data").splits["train"]
    assert [shard.runs for shard in record.shards] == [((0, 54),), ((0, 56), (1, 8)), ((1, 42), (2, 22)), ((2, 8),)]
    assert record.runs() == [(0, 110), (1, 50), (2, 30)]
    data = open_dataset(tmp_path / "data", "train")
    assert data.knows_corpora
    np.testing.assert_array_equal(data.corpus_of(np.arange(190)), np.repeat([0, 1, 2], [110, 50, 30]))
    named = NamedCorpora(("en-xx", "en-yy", "en-xx"), data.corpora)
    assert (named.names, named.rows("en-xx")) == (("en-xx", "en-yy"), [range(110), range(160, 190)])
    np.testing.assert_array_equal(named.of(np.array([189, 0, 110, 159])), [0, 0, 1, 1])


def test_data_of_an_earlier_version_is_one_corpus(tmp_path: Path) -> None:
    prepare(named_config(tmp_path), tmp_path / "data", workers=1)
    path = tmp_path / "data/manifest.json"
    tree = json.loads(path.read_text())
    for shard in tree["splits"]["train"]["shards"]:
        del shard["runs"]
    path.write_text(json.dumps(tree))
    data = open_dataset(tmp_path / "data", "train")
    assert not data.knows_corpora
    assert not data.corpus_of(np.arange(190)).any()
    with pytest.raises(
        DataError, match=r"did not note whose rows of train are: prepare it again to tell the corpora en-xx, en-yy"
    ):
        named_corpora(load_manifest(tmp_path / "data"), "train", data)
    prepare(named_config(tmp_path), tmp_path / "data", workers=1, overwrite=True)
    named = named_corpora(load_manifest(tmp_path / "data"), "train", open_dataset(tmp_path / "data", "train"))
    assert named is not None
    assert named.names == ("en-xx", "en-yy")


def test_runs_that_do_not_add_up_are_an_error(tmp_path: Path) -> None:
    prepare(named_config(tmp_path), tmp_path / "data", workers=1)
    path = tmp_path / "data/manifest.json"
    tree = json.loads(path.read_text())
    tree["splits"]["valid"]["shards"][0]["runs"] = [[0, 2]]
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="the runs of corpora do not add up to its 3 rows"):
        load_manifest(tmp_path / "data")


def test_runs_are_merged_and_looked_up() -> None:
    assert merged_runs([(0, 2), (0, 1), (1, 0), (0, 3), (2, 1), (0, 1)]) == [(0, 6), (2, 1), (0, 1)]
    ranges = CorpusRanges([(0, 2), (1, 1), (0, 3)])
    np.testing.assert_array_equal(ranges.of(np.arange(6)), [0, 0, 1, 0, 0, 0])
    assert (ranges.rows([0]), ranges.rows([1]), ranges.rows([7])) == ([range(2), range(3, 6)], [range(2, 3)], [])


def test_tags_are_ids_in_front_of_sources_and_not_text(tmp_path: Path) -> None:
    directions = {"en-xx": {"source_tags": ["__en__", "__xx__"]}, "en-yy": {"source_tags": ["__yy__"]}}
    config = named_config(tmp_path, directions=directions, tokenizer={"kind": "sentencepiece", "vocab_size": 70})
    prepare(config, tmp_path / "data", workers=1)
    tokenizer = load_tokenizers(tmp_path / "data/tokenizer").source
    (typed,) = tokenizer.encode([f"__en__ __xx__ {sentences(11)[10]}"])
    train, valid = open_dataset(tmp_path / "data", "train"), open_dataset(tmp_path / "data", "valid")
    assert train[0].source.tolist() == [*typed, tokenizer.eos_id]
    assert train.source_lengths[0] == len(typed) + 1
    assert tokenizer.tokens(train[110].source[:1].tolist()) == ["\u2581__yy__"]
    assert [valid.source_text(row) for row in range(3)] == ["the dog", "", "cat"]
    assert [len(valid[row].source) for row in range(3)] == [len(typed[:2]) + 3, 1, len(typed[:2]) + 2]


def test_a_tag_that_the_vocabulary_lacks_is_an_error(tmp_path: Path) -> None:
    prepare(data_config(tmp_path), tmp_path / "plain", workers=1)
    kept = {"kind": "tokenizer_directory", "path": str(tmp_path / "plain/tokenizer")}
    config = named_config(tmp_path, directions={"en-xx": {"source_tags": ["__xx__"]}}, tokenizer=kept)
    with pytest.raises(DataError, match=r"data.directions.en-xx.source_tags: '__xx__' is no entry of the vocabulary"):
        prepare(config, tmp_path / "data", workers=1)
    trained = {"kind": "sentencepiece", "vocab_size": 70}
    prepare(config.model_copy(update={"tokenizer": TrainedSentencePiece.model_validate(trained)}), tmp_path / "tagged", workers=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"directions": {"en-zz": {"source_tags": ["a"]}}},
            r"directions.en-zz is no name of a corpus \(en-xx, en-yy\); correct it",
        ),
        ({"directions": {"en-xx": {"source_tags": []}}}, "directions.en-xx\n.*neither source_tags nor start_token is given"),
        ({"directions": {"en/xx": {"source_tags": ["a"]}}}, "should match pattern"),
    ],
)
def test_directions_that_fit_no_corpus_are_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        named_config(tmp_path, **changes)


def test_tags_of_text_without_a_source_are_an_error(tmp_path: Path) -> None:
    text = {"kind": "text", "path": "a.txt", "name": "xx"}
    with pytest.raises(
        ValidationError, match=r"directions.xx.source_tags stand in front of sources, and train.0 is text without"
    ):
        named_config(tmp_path, train=[text], directions={"xx": {"source_tags": ["a"]}})
    named_config(tmp_path, train=[text], directions={"xx": {"start_token": "a"}})
    named_config(tmp_path, train=[{**text, "name": "zz"}], directions={"en-xx": {"source_tags": ["a"]}})


def test_all_corpora_of_a_split_have_names_or_none(tmp_path: Path) -> None:
    entries = [parallel(tmp_path, name, sentences(3), sentences(3)) for name in "ab"]
    with pytest.raises(ValidationError, match=r"train.1 has no name, other corpora of train have; name all of them, or none"):
        data_config(tmp_path, train=[{**entries[0], "name": "a"}, entries[1]])
    assert corpus_names(data_config(tmp_path, train=entries).train) == ()
    assert corpus_names(named_config(tmp_path).train) == ("en-xx", "en-yy", "en-xx")
