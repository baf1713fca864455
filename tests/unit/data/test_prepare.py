import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstrain.data.config import DataConfig
from dstrain.data.prepared import prepare as prepare_module
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.data.prepared.report import describe_data
from dstrain.data.sources import corpora, text
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair, load_tokenizers, save_tokenizers
from dstrain.errors import DataError, StorageError
from dstrain.storage import atomic
from dstrain.storage.hashing import HashingWriter, sha256_of_json
from dstrain.storage.lock import locked_output
from tests.unit.data.corpus import data_config, parallel, sentences, tree, write_lines

EOS = 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and several workers even for a small corpus."""
    monkeypatch.setattr(text, "MAX_BLOCK_LINES", 32)
    monkeypatch.setattr(prepare_module, "PAIRS_PER_WORKER", 50)


def shards(directory: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(directory).items() if name.endswith((".arrow", ".npy"))}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Path]:
    """A configuration of four shards, and its output by one worker."""
    folder = tmp_path_factory.mktemp("corpus")
    config = data_config(folder, pairs_per_shard=90)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "MAX_BLOCK_LINES", 32)
        prepare(config, folder / "data", workers=1)
    return config, folder / "data"


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(corpus: tuple[DataConfig, Path], tmp_path: Path, workers: int) -> None:
    config, one = corpus
    prepare(config, tmp_path / "data", workers=workers)
    assert tree(tmp_path / "data") == tree(one)
    assert sorted(shards(one)) == [
        *(f"train/{n:05d}.arrow" for n in range(4)),
        "train/lengths.npy",
        "valid/00000.arrow",
        "valid/lengths.npy",
    ]


def test_no_notes_or_temporary_files_stay(corpus: tuple[DataConfig, Path]) -> None:
    _, data = corpus
    assert {name for name in tree(data) if not name.endswith((".arrow", ".npy"))} == {
        "job.json",
        "manifest.json",
        "tokenizer/joint.model",
        "tokenizer/tokenizer.yaml",
    }


def test_the_manifest_describes_every_file(corpus: tuple[DataConfig, Path]) -> None:
    config, data = corpus
    manifest = load_manifest(data)
    assert manifest.data == config.model_dump(mode="json")
    assert manifest.tokenizer_fingerprint == load_tokenizers(data / "tokenizer").fingerprint
    assert [shard.rows for shard in manifest.splits["train"].shards] == [90, 90, 90, 30]
    assert {record.file for split in manifest.splits.values() for record in split.files} == set(shards(data))
    for name, split in manifest.splits.items():
        opened = open_dataset(data, name)
        assert (split.source_tokens, split.target_tokens) == (opened.source_lengths.sum(), opened.target_lengths.sum())
        for record in split.files:
            record.check(data, content=True)


def as_tsv(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    path = write_lines(folder / "pairs.tsv", [f"7\t{target}\t{source}" for source, target in pairs])
    return {"kind": "tsv", "path": str(path), "source_column": 2, "target_column": 1}


def as_jsonl(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    path = folder / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"en": source, "de": target}) + "\n" for source, target in pairs).encode()))
    return {"kind": "jsonl", "path": str(path), "source": "en", "target": "de"}


def as_gzip(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    paths = [folder / "pairs.en.gz", folder / "pairs.de.gz"]
    for path, lines in zip(paths, zip(*pairs, strict=True), strict=True):
        path.write_bytes(gzip.compress("\r\n".join(lines).encode()))
    return {"kind": "parallel", "source": str(paths[0]), "target": str(paths[1])}


def as_tsv_with_header(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    path = write_lines(folder / "named.tsv", ["\ufeffen\tde", *("\t".join(pair) for pair in pairs)])
    return {"kind": "tsv", "path": str(path), "header": True}


def as_parquet(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    rows = pa.table({"translation": [{"en": source, "de": target} for source, target in pairs]})
    pq.write_table(rows, folder / "pairs.parquet", row_group_size=77)
    path = str(folder / "pairs.parquet")
    return {"kind": "parquet", "path": path, "source": "translation.en", "target": "translation.de"}


def as_data_set(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"source": [a for a, _ in pairs], "target": [b for _, b in pairs]}).save_to_disk(folder / "set")
    return {"kind": "huggingface", "dataset": str(folder / "set")}


@pytest.mark.parametrize("form", [as_tsv, as_tsv_with_header, as_jsonl, as_gzip, as_parquet, as_data_set])
def test_every_form_of_the_same_text_gives_the_same_shards(corpus: tuple[DataConfig, Path], tmp_path: Path, form: Any) -> None:
    pairs = list(zip(sentences(300), sentences(300, suffix="en"), strict=True))
    config = data_config(tmp_path, train=[form(tmp_path, pairs)], pairs_per_shard=90)
    prepare(config, tmp_path / "data", workers=1)
    assert shards(tmp_path / "data") == shards(corpus[1])


def test_corpora_follow_one_another_and_test_sets_have_their_names(corpus: tuple[DataConfig, Path], tmp_path: Path) -> None:
    lines, targets = sentences(300), sentences(300, suffix="en")
    parts = [parallel(tmp_path, f"part{a}", lines[a:b], targets[a:b]) for a, b in ((0, 70), (70, 71), (71, 300))]
    config = data_config(tmp_path, train=parts, test={"news.2024": [parts[0]], "other": [parts[1], parts[0]]}, pairs_per_shard=90)
    prepare(config, tmp_path / "data", workers=1)
    assert all(content == shards(tmp_path / "data")[name] for name, content in shards(corpus[1]).items())
    other = open_dataset(tmp_path / "data", "other")
    assert [other.source_text(row) for row in range(len(other))] == [lines[70], *lines[:70]]
    assert len(open_dataset(tmp_path / "data", "news.2024")) == 70


@pytest.mark.parametrize("name", ["train", "tokenizer", "../x", "", "a b", ".hidden"])
def test_names_of_test_sets_are_names_of_directories(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a test set"):
        data_config(tmp_path, test={name: [{"kind": "grammar", "split": "test", "num_pairs": 5}]})


def test_the_grammar_is_a_corpus(tmp_path: Path) -> None:
    split = {name: {"kind": "grammar", "split": name, "num_pairs": 100} for name in ("train", "valid", "test")}
    config = data_config(
        tmp_path, train=[split["train"]], valid=[split["valid"]], test={"test": [split["test"]]}, pairs_per_shard=40
    )
    report = prepare(config, tmp_path / "data", workers=1)
    assert [split.pairs_kept for split in report.splits.values()] == [100, 100, 100]
    test = open_dataset(tmp_path / "data", "test")
    assert load_tokenizers(tmp_path / "data/tokenizer").target.decode([test[99].target]) == [test.target_text(99)]


def test_drops_are_counted_by_reason_and_only_in_training(tmp_path: Path) -> None:
    words = [" ".join(["the"] * count) for count in range(12)]
    source = [words[3], "", words[11], words[2], "  \t", words[9], words[4], words[5]]
    target = [words[3], words[1], words[2], words[10], "", words[9], words[1], words[2]]
    pair = parallel(tmp_path, "pairs", source, target)
    limits = {"max_source_length": 11, "max_target_length": 10, "max_ratio": 2}
    save_tokenizers(TokenizerPair(*[DictionaryTokenizer(b"the 1\n")] * 2), tmp_path / "words")
    tokenizer = {"kind": "tokenizer_directory", "path": str(tmp_path / "words")}
    config = data_config(tmp_path, train=[pair], valid=[pair], filter=limits, tokenizer=tokenizer)
    report = prepare(config, tmp_path / "data", workers=1)
    # lengths with EOS: 4/4 kept; empty; 12/3 too long; 3/11 too long; empty; 10/10 kept; 5/2 ratio 2.5; 6/3 ratio 2 kept
    assert report.splits["train"].dropped == {"empty": 2, "too long": 2, "ratio": 1}
    train, valid = open_dataset(tmp_path / "data", "train"), open_dataset(tmp_path / "data", "valid")
    assert train.source_lengths.tolist() == [4, 10, 6]
    assert [train[row].target.tolist() for row in range(3)] == [valid[row].target.tolist() for row in (0, 5, 7)]
    assert valid.source_lengths.tolist() == [4, 1, 12, 3, 1, 10, 5, 6]
    assert valid[1].source.tolist() == valid[4].target.tolist() == [EOS]
    assert valid.source_text(4) == "  \t"
    line = next(line for line in report.lines() if line.startswith("train: "))
    assert "3 pairs" in line
    assert "dropped 5 of 8: empty 2, too long 2, ratio 1" in line


def test_long_sources_are_cut_and_counted_in_every_split(tmp_path: Path) -> None:
    words = [" ".join(["the"] * count) for count in range(12)]
    pair = parallel(
        tmp_path, "pairs", [words[3], words[4], words[11], "", words[5]], [words[3], words[1], words[2], words[1], words[7]]
    )
    save_tokenizers(TokenizerPair(*[DictionaryTokenizer(b"the 1\n__en__ 1\n")] * 2), tmp_path / "words")
    config = data_config(
        tmp_path,
        train=[{**pair, "name": "a"}],
        valid=[{**pair, "name": "b"}],
        directions={"b": {"source_tags": ["__en__"]}},
        filter={"max_source_length": 5, "max_target_length": 6, "long_sources": "truncate"},
        tokenizer={"kind": "tokenizer_directory", "path": str(tmp_path / "words")},
    )
    report = prepare(config, tmp_path / "data", workers=1)
    train, valid = open_dataset(tmp_path / "data", "train"), open_dataset(tmp_path / "data", "valid")
    # lengths with EOS: 4, 5, 12 -> 5, empty, 6 -> 5 with a target of 8, which is too long
    the, tag = train[0].source[0], valid[0].source[0]
    assert [train[row].source.tolist() for row in range(3)] == [[the] * 3 + [EOS], [the] * 4 + [EOS], [the] * 4 + [EOS]]
    assert report.splits["train"].dropped == {"empty": 1, "too long": 1, "ratio": 0}
    # a tag is a token of the source
    assert valid.source_lengths.tolist() == [5, 5, 5, 1, 5]
    assert valid[2].source.tolist() == [tag] + [the] * 3 + [EOS]
    assert valid.source_text(2) == words[11], "the raw text is whole"
    assert (report.splits["train"].truncated, report.splits["valid"].truncated) == (2, 3)
    assert "dropped 2 of 5: empty 1, too long 1; 2 sources truncated" in report.lines()[2]
    assert "3 sources truncated" in describe_data(tmp_path / "data")[3]


def test_text_without_a_source_is_judged_by_its_own_length_and_loses_its_blank_lines_everywhere(tmp_path: Path) -> None:
    words = [" ".join(["the"] * count) for count in range(12)]
    lines = [words[3], "", words[11], " \t", words[9], words[1]]
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    text = {"kind": "text", "path": str(path)}
    save_tokenizers(TokenizerPair(*[DictionaryTokenizer(b"the 1\n")] * 2), tmp_path / "words")
    tokenizer = {"kind": "tokenizer_directory", "path": str(tmp_path / "words")}
    limits = {"max_source_length": 1, "max_target_length": 10, "max_ratio": 2}
    config = data_config(tmp_path, train=[text], valid=[text], filter=limits, tokenizer=tokenizer)
    report = prepare(config, tmp_path / "data", workers=1)
    assert report.splits["train"].dropped == {"empty": 2, "too long": 1, "ratio": 0}
    assert report.splits["valid"].dropped == {"empty": 2}
    train, valid = open_dataset(tmp_path / "data", "train"), open_dataset(tmp_path / "data", "valid")
    assert (train.source_lengths.tolist(), train.target_lengths.tolist()) == ([1, 1, 1], [4, 10, 2])
    assert train[0].source.tolist() == [EOS]
    assert [valid.target_text(row) for row in range(len(valid))] == [words[3], words[11], words[9], words[1]]
    assert [valid.source_text(row) for row in range(len(valid))] == [""] * 4
    train_line, valid_line = report.lines()[2:]
    assert train_line.startswith("train: 3 lines, 16 tokens; <unk> 0.00 %; dropped 3 of 6: empty 2, too long 1;")
    assert valid_line.startswith("valid: 4 lines, 28 tokens; <unk> 0.00 %; dropped 2 of 6: empty 2;")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(" = [^=]", [0, 4, 6, 7, 8, 9]), (r"\s*$", [0, 3, 6, 8]), (None, None)],
    ids=["titles", "blank lines", "none"],
)
def test_documents_begin_where_the_corpus_says(tmp_path: Path, pattern: str | None, expected: list[int] | None) -> None:
    """At the first line that is kept of them; another corpus begins with one. Blank and long lines are dropped."""
    long = " ".join(["the"] * 40)
    first = ["the old", " = = the = = ", "dog", "", "dog dog", " = one = ", long, "cat", "", ""]
    first += [f" = {long}", "tree", " = x = ", ""]
    second = ["sees", " = end = "]
    texts = [write_lines(tmp_path / f"{number}.txt", lines) for number, lines in enumerate([first, second])]
    save_tokenizers(TokenizerPair(*[DictionaryTokenizer(b"the 1\n")] * 2), tmp_path / "words")
    config = data_config(
        tmp_path,
        train=[{"kind": "text", "path": str(path), "document_start": pattern} for path in texts],
        valid=[{"kind": "text", "path": str(texts[0])}],
        tokenizer={"kind": "tokenizer_directory", "path": str(tmp_path / "words")},
        filter={"max_target_length": 20},
        pairs_per_shard=5,
    )
    prepare(config, tmp_path / "data", workers=1)
    train = open_dataset(tmp_path / "data", "train")
    # kept: the old | = = the = = | dog | dog dog | = one = | cat | tree | = x = || sees | = end =
    assert train.target_lengths.tolist() == [3, 6, 2, 3, 4, 2, 2, 4, 2, 4]
    assert (None if train.document_starts is None else train.document_starts.tolist()) == expected
    assert (tmp_path / "data/train/documents.npy").exists() == (pattern is not None)
    assert not (tmp_path / "data/valid/documents.npy").exists()
    if pattern is not None:
        assert prepare(config, tmp_path / "data", workers=1).finished_before
        damaged = tmp_path / "data/train/documents.npy"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"documents\.npy"):
            open_dataset(tmp_path / "data", "train")


def test_documents_are_the_same_after_an_interruption_and_with_more_workers(tmp_path: Path) -> None:
    lines = [f"{'= ' if row % 7 == 3 else ''}{line}" for row, line in enumerate(sentences(300))]
    text = {"kind": "text", "path": str(write_lines(tmp_path / "text.txt", lines)), "document_start": "= "}
    config = data_config(tmp_path, train=[text], pairs_per_shard=90)
    prepare(config, tmp_path / "one", workers=1)
    assert open_dataset(tmp_path / "one", "train").document_starts.tolist() == [0, *range(3, 300, 7)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "write_data_manifest", None)
        with pytest.raises(TypeError):
            prepare(config, tmp_path / "two", workers=3)
    (tmp_path / "two/train/00002.arrow").unlink()
    prepare(config, tmp_path / "two", workers=2)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_text_and_pairs_may_stand_side_by_side(tmp_path: Path) -> None:
    text = {"kind": "text", "path": str(write_lines(tmp_path / "text.txt", ["the old dog", ""]))}
    pairs = parallel(tmp_path, "pairs", sentences(60), sentences(60, suffix="en"))
    config = data_config(tmp_path, train=[text, pairs], pairs_per_shard=7)
    report = prepare(config, tmp_path / "data", workers=1)
    assert report.splits["train"].dropped == {"empty": 1, "too long": 0, "ratio": 0}
    train = open_dataset(tmp_path / "data", "train")
    assert len(train) == 61
    assert train.source_lengths[0] == 1
    assert (train.source_lengths[1:] > 2).all()


def test_a_line_of_a_hundred_thousand_tokens_is_dropped_and_counted(tmp_path: Path) -> None:
    long = "the dog " * 60_000
    config = data_config(tmp_path, train=[parallel(tmp_path, "long", [*sentences(50), long], [*sentences(50), "the dog"])])
    report = prepare(config, tmp_path / "data", workers=1)
    assert report.splits["train"].dropped == {"empty": 0, "too long": 1, "ratio": 0}
    assert report.splits["train"].pairs_kept == 50


def test_a_long_line_stays_in_an_evaluation_split(tmp_path: Path) -> None:
    long = "the dog " * 60_000
    config = data_config(tmp_path, valid=[parallel(tmp_path, "long", [long, "the"], ["dog", long])])
    prepare(config, tmp_path / "data", workers=1)
    assert (
        min(
            open_dataset(tmp_path / "data", "valid").source_lengths[0], open_dataset(tmp_path / "data", "valid").target_lengths[1]
        )
        > 100_000
    )


def test_everything_dropped_is_an_error(tmp_path: Path) -> None:
    config = data_config(tmp_path, filter={"max_source_length": 1})
    with pytest.raises(DataError, match=r"all 300 pairs of the train split were dropped \(too long 300\); .* --overwrite"):
        prepare(config, tmp_path / "data", workers=1)


def test_sides_of_unequal_length_name_both_counts(tmp_path: Path) -> None:
    config = data_config(tmp_path, train=[parallel(tmp_path, "uneven", ["a"] * 1200, ["b"] * 1199)])
    with pytest.raises(DataError, match=r"uneven\.en has 1,200 lines, .*uneven\.de has 1,199: line k of one must translate"):
        prepare(config, tmp_path / "data", workers=1)


@pytest.mark.parametrize("split", ["valid", "train"])
def test_an_empty_split_is_an_error(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match=rf"the {split} split holds no pairs \(.*empty\.en, .*empty\.de\); give it at least one"):
        prepare(data_config(tmp_path, **{split: [parallel(tmp_path, "empty", [], [])]}), tmp_path / "data", workers=1)


def test_a_corpus_of_three_lines(tmp_path: Path) -> None:
    pair = parallel(tmp_path, "tiny", sentences(3), sentences(3))
    with pytest.raises(DataError, match=r"vocab_size is 8000, the training text supports at most (\d+)") as caught:
        prepare(data_config(tmp_path, train=[pair], tokenizer={"kind": "sentencepiece"}), tmp_path / "data", workers=2)
    size = int(str(caught.value).split("set it to ")[1].split(" ")[0])
    config = data_config(tmp_path, train=[pair], tokenizer={"kind": "sentencepiece", "vocab_size": size})
    assert prepare(config, tmp_path / "data", workers=2).splits["train"].pairs_kept == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_the_text_is_named_whoever_finds_it(tmp_path: Path, workers: int) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", ['{"source": "the", "target": "the"}'] * 150 + ['{"source": "the"}'])
    config = data_config(tmp_path, valid=[{"kind": "jsonl", "path": str(bad)}])
    with pytest.raises(DataError, match=r"bad\.jsonl:151: no field 'target'"):
        prepare(config, tmp_path / "data", workers=workers)


def test_an_unset_variable_is_named_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSTRAIN_DATA", raising=False)
    config = data_config(tmp_path, train=[{"kind": "tsv", "path": "${DSTRAIN_DATA}/x.tsv"}])
    with pytest.raises(DataError, match="the environment variable DSTRAIN_DATA is not set"):
        prepare(config, tmp_path / "data", workers=1)
    assert tree(tmp_path / "data") == {}


def copied(source: Path, target: Path) -> Path:
    for name, content in tree(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return target


def test_a_second_run_says_so_and_touches_nothing(
    corpus: tuple[DataConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, one = corpus
    data = copied(one, tmp_path / "data")
    before = tree(data)
    monkeypatch.setattr(corpora, "scan_file", None)
    monkeypatch.setattr(prepare_module, "_Preparation", None)
    report = prepare(config, data, workers=4)
    assert report.finished_before
    assert "was finished before; nothing to do" in report.lines()[0]
    assert report.splits["train"].pairs_kept == 300
    assert tree(data) == before


def test_a_finished_directory_with_a_missing_shard_is_prepared_again(corpus: tuple[DataConfig, Path], tmp_path: Path) -> None:
    data = copied(corpus[1], tmp_path / "data")
    (data / "train/00001.arrow").unlink()
    assert not prepare(corpus[0], data, workers=1).finished_before
    assert tree(data) == tree(corpus[1])


def test_another_configuration_needs_overwrite(tmp_path: Path) -> None:
    prepare(data_config(tmp_path), tmp_path / "data", workers=1)
    other = data_config(tmp_path, filter={"max_source_length": 5}, pairs_per_shard=90)
    with pytest.raises(
        DataError,
        match=r"belongs to another preparation \(its recipe differs in data\.filter, data\.pairs_per_shard\); .* or --overwrite",
    ):
        prepare(other, tmp_path / "data", workers=1)
    prepare(other, tmp_path / "data", workers=1, overwrite=True)
    prepare(other, tmp_path / "fresh", workers=1)
    assert tree(tmp_path / "data") == tree(tmp_path / "fresh")


def test_text_that_changed_needs_overwrite_and_a_new_date_does_not(tmp_path: Path) -> None:
    config = data_config(tmp_path)
    prepare(config, tmp_path / "data", workers=1)
    os.utime(tmp_path / "train.en", ns=(1, 1))
    assert prepare(config, tmp_path / "data", workers=1).finished_before
    content = (tmp_path / "train.en").read_text()
    (tmp_path / "train.en").write_text(content.replace("cat", "dog", 1))
    with pytest.raises(DataError, match=r"\(the content of .*train\.en has changed\); choose another --output, or --overwrite"):
        prepare(config, tmp_path / "data", workers=1)


def test_a_file_that_is_read_as_another_kind_is_checked_again(tmp_path: Path) -> None:
    """Its content is as before, but not what is asked of it."""
    path = write_lines(tmp_path / "file", [f"{line}\t{line}" for line in sentences(99)] + ["the\tdog\truns"])
    as_lines, as_table = ({"train": [{"kind": kind, "path": str(path)}]} for kind in ("text", "tsv"))
    prepare(data_config(tmp_path, **as_lines), tmp_path / "data", workers=1)
    with pytest.raises(DataError, match="file:100: 3 tab-separated columns, line 1 has 2"):
        prepare(data_config(tmp_path, **as_table), tmp_path / "data", workers=1, overwrite=True)


def test_data_of_an_older_version_is_the_same_job(tmp_path: Path) -> None:
    """Their job and manifest spell the same recipe without the keys that came later."""
    lines = [json.dumps({"source": line, "target": line}) for line in sentences(300)]
    corpus = {"kind": "jsonl", "path": str(write_lines(tmp_path / "pairs.jsonl", lines))}
    config, data = data_config(tmp_path, train=[corpus]), tmp_path / "data"
    prepare(config, data, workers=1)
    job, manifest = (json.loads((data / name).read_text()) for name in ("job.json", "manifest.json"))
    job["data"]["train"] = manifest["data"]["train"] = [{**corpus, "source_field": "source", "target_field": "target"}]
    for file in job["inputs"]:
        del file["kind"]
    content = [1, job["data"], [file["sha256"] for file in job["inputs"]], None]
    job["fingerprint"] = manifest["job"] = sha256_of_json(content)
    (data / "job.json").write_text(json.dumps(job))
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(config, data, workers=1).finished_before
    with pytest.raises(DataError, match=r"\(its recipe differs in data\.pairs_per_shard\)"):
        prepare(config.model_copy(update={"pairs_per_shard": 9}), data, workers=1)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("key", ["train", "tokenizer"])
def test_what_is_read_several_times_is_no_pipe(tmp_path: Path, key: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = str(tmp_path / "pipe")
    changes = {"train": [{"kind": "text", "path": pipe}], "tokenizer": {"kind": "sentencepiece_files", "source_model": pipe}}
    with pytest.raises(DataError, match=r"pipe: a stream is read only once, and this is read several times; write it to a file"):
        prepare(data_config(tmp_path, **{key: changes[key]}), tmp_path / "data", workers=1)
    assert tree(tmp_path / "data") == {}


def test_an_existing_tokenizer_is_used_and_its_change_is_seen(tmp_path: Path) -> None:
    dictionaries = [
        DictionaryTokenizer("".join(f"{word} 1\n" for word in words).encode()) for words in (["the", "old"], ["theen"])
    ]
    save_tokenizers(TokenizerPair(*dictionaries), tmp_path / "given")
    config = data_config(tmp_path, tokenizer={"kind": "tokenizer_directory", "path": str(tmp_path / "given")})
    report = prepare(config, tmp_path / "data", workers=2)
    assert (report.source_vocab_size, report.target_vocab_size, report.shared) == (6, 5, False)
    assert "tokenizer: 6 source + 5 target entries" in report.lines()
    first = open_dataset(tmp_path / "data", "train")[0]
    assert (first.source.tolist()[0], first.target.tolist()[0]) == (4, 4)
    save_tokenizers(TokenizerPair(dictionaries[0], dictionaries[0]), tmp_path / "given")
    with pytest.raises(DataError, match="the tokenizer that the recipe names has changed"):
        prepare(config, tmp_path / "data", workers=1)


def test_a_vocabulary_over_65536_is_int32(tmp_path: Path) -> None:
    words = "".join(f"word{number} 1\n" for number in range(70_000))
    save_tokenizers(TokenizerPair(*[DictionaryTokenizer(words.encode())] * 2), tmp_path / "given")
    config = data_config(
        tmp_path,
        train=[parallel(tmp_path, "wide", ["word69999 word1"], ["word2"])],
        tokenizer={"kind": "tokenizer_directory", "path": str(tmp_path / "given")},
    )
    prepare(config, tmp_path / "data", workers=1)
    example = open_dataset(tmp_path / "data", "train")[0]
    assert example.source.dtype == np.int32
    assert example.source.tolist() == [70_003, 5, EOS]


def test_a_failed_job_leaves_the_directory_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="supports at most"):
        prepare(data_config(tmp_path, tokenizer={"kind": "sentencepiece", "vocab_size": 9999}), tmp_path / "data", workers=1)
    prepare(data_config(tmp_path), tmp_path / "data", workers=1)
    assert len(open_dataset(tmp_path / "data", "valid")) == 5


def test_foreign_directories_and_files_are_unchanged(tmp_path: Path) -> None:
    config = data_config(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"mine holds files that `dstrain prepare` did not make; choose another --output"):
            prepare(config, tmp_path / "mine", workers=1, overwrite=overwrite)
    assert tree(tmp_path / "mine") == {"thesis.tex": b"x"}
    with pytest.raises(StorageError, match=r"--output .*train\.en is the same as .*train\.en of data\.train\.0"):
        prepare(config, tmp_path / "train.en", workers=1)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        locked_output(tmp_path / "data", busy=StorageError),
        pytest.raises(DataError, match=r"another process is preparing .*data \(process \d+, this one\); wait"),
    ):
        prepare(data_config(tmp_path), tmp_path / "data", workers=1)
    prepare(data_config(tmp_path), tmp_path / "data", workers=1)


class FullDisk(HashingWriter):
    """Takes a number of bytes over all files, then no more."""

    left = 0

    def write(self, data: Any) -> int:
        type(self).left -= memoryview(data).nbytes
        if type(self).left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [100, 2_000, 252_000, 258_000, 266_000])
def test_a_full_disk_keeps_what_was_finished(
    corpus: tuple[DataConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    config, one = corpus
    config = config.model_copy(update={"tokenizer": config.tokenizer})
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "HashingWriter", FullDisk)
        patch.setattr(FullDisk, "left", room)
        patch.setattr(prepare_module, "WorkerPool", InProcess)
        with pytest.raises(
            StorageError, match=r"no space left to write .* \(No space left on device\); finished files are kept: free"
        ):
            prepare(config, tmp_path / "data", workers=1)
    left = tree(tmp_path / "data")
    assert not any(name.endswith(".tmp") for name in left)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.arrow")}
    prepare(config, tmp_path / "data", workers=1)
    assert tree(tmp_path / "data") == tree(one)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


class InProcess:
    """A worker pool without processes."""

    def __init__(self, make_work: Any, workers: int) -> None:
        self._work = make_work()

    def map(self, tasks: Any) -> Any:
        return map(self._work, tasks)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("stop", [(0, 40), (1, 64), (2, 0), (3, 0)])
def test_an_interrupted_run_goes_on_at_the_first_missing_shard(
    corpus: tuple[DataConfig, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (config, one), (finished, place) = corpus, stop
    data = tmp_path / "data"
    encode = prepare_module.make_encoder

    def stop_in_the_middle(*arguments: Any) -> Any:
        encoder = encode(*arguments)

        def work(block: Any) -> Any:
            if block.split == "train" and block.text.first >= 90 * finished + place:
                raise KeyboardInterrupt
            return encoder(block)

        return work

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "make_encoder", stop_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, data, workers=1)
    assert f"interrupted; finished shards stay in {data}: run the same command again to go on" in caplog.text
    stamps = {path.name: path.stat().st_mtime_ns for path in data.glob("train/*.arrow")}
    assert sorted(stamps) == [f"{number:05d}.arrow" for number in range(finished)]
    report = prepare(config, data, workers=1)
    assert tree(data) == tree(one)
    assert {name: (data / "train" / name).stat().st_mtime_ns for name in stamps} == stamps
    assert report.splits["train"].pairs_encoded == 300 - 90 * finished
    assert report.splits["train"].pairs_read == 300


def test_a_damaged_finished_shard_is_made_again(
    corpus: tuple[DataConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, one = corpus
    data = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_data_manifest", None)
        with pytest.raises(TypeError):
            prepare(config, data, workers=1)
    (data / "train/00002.arrow").write_bytes(b"short")
    assert prepare(config, data, workers=1).splits["train"].pairs_encoded == 120
    assert tree(data) == tree(one)
