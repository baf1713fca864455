import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstrain.data.config import DataConfig
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.data.sources import fairseq_binary
from dstrain.data.sources.fairseq_binary import IdReader, IndexedIds
from dstrain.data.sources.fairseq_directory import fairseq_data
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.errors import DataError
from tests.paths import GOLDEN, needs_golden
from tests.unit.data.corpus import tree
from tests.unit.data.fairseq_files import write_dictionary, write_legacy, write_mmap, write_pairs

ROWS = [[4, 5, 2], [2], [6, 6, 6, 6, 2], [7, 2]]
WORDS = ["the", "old", "dog", "runs"]


def rows_of(dataset: Dataset, side: str) -> list[list[int]]:
    return [getattr(dataset[row], side).tolist() for row in range(len(dataset))]


@pytest.mark.parametrize(
    ("write", "letter"),
    [*[(write_mmap, letter) for letter in "HIiqBh"], *[(write_legacy, letter) for letter in "iqH"]],
)
def test_both_formats_in_every_type(tmp_path: Path, write: Callable[..., None], letter: str) -> None:
    write(tmp_path / "train.en-de.en", ROWS, letter)
    ids = IndexedIds(tmp_path / "train.en-de.en")
    assert len(ids) == len(ROWS)
    for start, count in ((0, 4), (1, 2), (3, 1)):
        tokens, lengths = ids.read(start, count)
        assert [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])] == ROWS[start : start + count]


def test_blocks_are_bounded_by_sentences_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[4] * (number % 7) + [2] for number in range(50)]
    for side in "ab":
        write_mmap(tmp_path / side, rows)
    monkeypatch.setattr(fairseq_binary, "MAX_BLOCK_LINES", 8)
    monkeypatch.setattr(fairseq_binary, "MAX_BLOCK_BYTES", 40)
    reader, found = IdReader(tmp_path / "a", tmp_path / "b", start=3), []
    while len(found) < 47:
        block = reader.read(47 - len(found))
        assert block.first == 3 + len(found)
        assert block.num_lines <= 8
        assert block.num_lines == 1 or block.source.ids.nbytes <= 40
        found += [row.tolist() for row in np.split(block.target.ids, np.cumsum(block.target.lengths)[:-1])]
    assert found == rows[3:]


def altered(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda idx: b"nonsense" + idx[8:], r"en\.idx begins with b'nonsense.*no index of fairseq's"),
        (lambda idx: b"", r"en\.idx begins with b''"),
        (lambda idx: altered(idx, 9, struct.pack("<Q", 2)), r"en\.idx is an index of version 2, known is 1"),
        (lambda idx: altered(idx, 17, b"\x07"), r"en\.idx has type code 7, which is no integer type; known are 1, 2"),
        (lambda idx: altered(idx, 17, b"\x63"), r"en\.idx has type code 99"),
        (lambda idx: idx[:20], r"en\.idx ends inside its header: it is truncated"),
        (lambda idx: idx[:-1], r"en\.idx holds 73 bytes, an index of 4 sentences has 74: it is truncated or altered"),
        (lambda idx: idx + b"\0", r"holds 75 bytes, an index of 4 sentences has 74"),
        (lambda idx: altered(idx, 18, struct.pack("<Q", 1 << 60)), r"an index of 1,152,921,504,606,846,976 sentences"),
        (
            lambda idx: altered(idx, 38, struct.pack("<i", 9)),
            r"en\.bin holds 22 bytes, the lengths .* add up to 36 and overrun it",
        ),
        (lambda idx: altered(idx, 38, struct.pack("<i", 1)), r"en\.bin holds 22 bytes, .* add up to 20 and leave a rest of it"),
        (lambda idx: altered(idx, 26, struct.pack("<i", 2)), r"en\.idx: sentence 2 does not begin where the one before ends"),
        (lambda idx: altered(idx, 30, struct.pack("<i", -1)), r"en\.idx: sentence 2 does not begin"),
        (lambda idx: altered(idx, 58, struct.pack("<q", 6)), r"en\.idx: sentence 3 does not begin"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, alter: Callable[[bytes], bytes], message: str) -> None:
    write_mmap(tmp_path / "train.en-de.en", ROWS)
    path = tmp_path / "train.en-de.en.idx"
    path.write_bytes(alter(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        IndexedIds(tmp_path / "train.en-de.en")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, 3, "index of version 3"),
        (16, 6, "type code 6"),
        (24, 8, "items of 8 bytes and 4 dimensions for 4 sentences, not one-dimensional rows of int32"),
        (48 + 40 + 8, 4, "sentence 2 does not begin where the one before ends"),
        (48 + 80, 2, "sentence 2 does not begin where the one before ends"),
    ],
)
def test_a_damaged_legacy_index_is_refused(tmp_path: Path, at: int, value: int, message: str) -> None:
    write_legacy(tmp_path / "train", ROWS)
    path = tmp_path / "train.idx"
    path.write_bytes(altered(path.read_bytes(), at, struct.pack("<q", value)))
    with pytest.raises(DataError, match=message):
        IndexedIds(tmp_path / "train")


def test_a_truncated_or_missing_bin_is_refused(tmp_path: Path) -> None:
    write_mmap(tmp_path / "train", ROWS)
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train\.bin holds 20 bytes, the lengths of train\.idx add up to 22 and overrun it"):
        IndexedIds(tmp_path / "train")
    path.unlink()
    with pytest.raises(DataError, match=r"train\.bin: No such file or directory; both files of a prefix are needed"):
        IndexedIds(tmp_path / "train")


def directory(path: Path, **pieces: list[list[int]]) -> Path:
    """A small directory of fairseq's; a piece has the same ids on both sides."""
    for piece, rows in {"train": ROWS, "valid": ROWS, **pieces}.items():
        write_pairs(path, piece, rows, rows)
    for language in ("en", "de"):
        write_dictionary(path / f"dict.{language}.txt", WORDS)
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[4, 2], [4, 8, 2]], r"train\.en-de\.en\.idx: sentence 2 holds id 8, the dictionary has 8 entries"),
        ([[4, 2], [5, 2], [4, 4]], r"train\.en-de\.en\.idx: sentence 3 does not end in </s> \(id 2\)"),
        ([[4, 2], [], [4, 2]], r"train\.en-de\.en\.idx: sentence 2 does not end in </s>"),
        ([[], []], r"train\.en-de\.en\.idx: sentence 1 does not end in </s>"),
    ],
)
def test_ids_that_mean_nothing_are_refused(tmp_path: Path, rows: list[list[int]], message: str) -> None:
    config = fairseq_data([directory(tmp_path / "bin", train=rows)])
    with pytest.raises(DataError, match=message):
        prepare(config, tmp_path / "data", workers=1)


def test_negative_ids_are_refused(tmp_path: Path) -> None:
    write_mmap(directory(tmp_path / "bin") / "train.en-de.de", [*ROWS[:3], [-4, 2]], "i")
    with pytest.raises(DataError, match=r"train\.en-de\.de\.idx: sentence 4 holds id -4"):
        prepare(fairseq_data([tmp_path / "bin"]), tmp_path / "data", workers=1)


def test_unequal_sides_are_refused(tmp_path: Path) -> None:
    write_mmap(directory(tmp_path / "bin") / "train.en-de.de", ROWS[:3])
    with pytest.raises(DataError, match=r"en\.idx has 4 sentences, .*de\.idx has 3: sentence k of one must translate sentence k"):
        prepare(fairseq_data([tmp_path / "bin"]), tmp_path / "data", workers=1)


def test_dictionaries_are_checked(tmp_path: Path) -> None:
    folder = directory(tmp_path / "bin")
    write_dictionary(folder / "dict.en.txt", [*WORDS, "the"])
    with pytest.raises(DataError, match=r"dict\.en\.txt:5: symbol 'the' occurs twice; .*`#fairseq:overwrite`"):
        prepare(fairseq_data([folder]), tmp_path / "data", workers=1)
    (folder / "dict.en.txt").write_text("the 1\nold 1\ndog 1\nruns 1\nthe 1 #fairseq:overwrite\n")
    prepare(fairseq_data([folder]), tmp_path / "data", workers=1)
    assert load_tokenizers(tmp_path / "data/tokenizer").source.encode(["the"]) == [[8]]
    (folder / "dict.de.txt").unlink()
    with pytest.raises(DataError, match=r"bin has no dict\.de\.txt; copy the dictionary"):
        fairseq_data([folder])


def test_one_dict_txt_serves_both(tmp_path: Path) -> None:
    folder = directory(tmp_path / "bin")
    (folder / "dict.en.txt").rename(folder / "dict.txt")
    (folder / "dict.de.txt").unlink()
    prepare(fairseq_data([folder]), tmp_path / "data", workers=1)
    assert load_tokenizers(tmp_path / "data/tokenizer").shared


def test_names_of_specials_inside_a_sentence_are_unknown_words(tmp_path: Path) -> None:
    """fairseq looks the word `</s>` up in its dictionary; dstrain's text never gives a special, and neither do its ids."""
    folder = directory(tmp_path / "bin", train=[[4, 2, 5, 2], [0, 1, 3, 4, 2]])
    prepare(fairseq_data([folder]), tmp_path / "data", workers=1)
    assert rows_of(open_dataset(tmp_path / "data", "train"), "source") == [[4, 3, 5, 2], [3, 3, 3, 4, 2]]


def test_pieces_directories_and_the_other_order_of_languages(tmp_path: Path) -> None:
    first = directory(tmp_path / "one", train1=[[5, 2]], valid1=[[6, 2]], test=[[7, 2]])
    for path in list(first.glob("train1.en-de.*")):
        path.rename(path.with_name(path.name.replace("en-de", "de-en")))
    second = directory(tmp_path / "two", train=[[4, 4, 4, 2]], train2=[[7, 7, 2]])
    config = fairseq_data([first, second], source="en", target="de")
    assert list(config.test) == ["valid1", "test"]
    prepare(config, tmp_path / "data", workers=1)
    kept = [row for row in ROWS if len(row) > 1]
    assert rows_of(open_dataset(tmp_path / "data", "train"), "target") == [*kept, [5, 2], [4, 4, 4, 2]]
    record = load_manifest(tmp_path / "data").splits["train"]
    assert (record.pairs_read, record.dropped["empty"]) == (6, 1)
    assert rows_of(open_dataset(tmp_path / "data", "valid"), "source") == ROWS
    assert rows_of(open_dataset(tmp_path / "data", "valid1"), "source") == [[6, 2]]


def test_reversed_training(tmp_path: Path) -> None:
    folder = directory(tmp_path / "bin")
    write_pairs(folder, "train", [[4, 2]], [[5, 2]])
    prepare(fairseq_data([folder], source="de", target="en"), tmp_path / "data", workers=1)
    train = open_dataset(tmp_path / "data", "train")
    assert (rows_of(train, "source"), rows_of(train, "target")) == ([[5, 2]], [[4, 2]])


def test_directories_that_are_no_corpus_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is no directory; give the --destdir"):
        fairseq_data([tmp_path / "nowhere"])
    folder = directory(tmp_path / "bin")
    with pytest.raises(DataError, match=r"has no train\.en-fr\.en\.idx; check --source-lang and --target-lang"):
        fairseq_data([folder], source="en", target="fr")
    with pytest.raises(DataError, match=r"names no single language pair \(found: en-de\); give --source-lang"):
        fairseq_data([folder], target="fr")
    write_mmap(tmp_path / "lm/train", ROWS)
    with pytest.raises(DataError, match=r"lm has no valid\.idx; binarize a validation set"):
        fairseq_data([tmp_path / "lm"])
    write_mmap(tmp_path / "lm/valid", ROWS)
    with pytest.raises(DataError, match=r"lm has no dict\.txt; copy the dictionary"):
        fairseq_data([tmp_path / "lm"])
    (folder / "train.en-de.en.idx").unlink()
    (folder / "train.en-de.en").write_text("raw\n")
    with pytest.raises(DataError, match=r"holds train as text \(--dataset-impl raw\).*kind: parallel"):
        fairseq_data([folder], source="en", target="de")
    other = directory(tmp_path / "other")
    write_dictionary(other / "dict.de.txt", WORDS[::-1])
    with pytest.raises(DataError, match=r"other/dict\.de\.txt differs from .*one id would be two words"):
        fairseq_data([directory(tmp_path / "again"), other])
    for path in other.glob("valid*"):
        path.unlink()
    with pytest.raises(DataError, match=r"has no valid\.en-de\.en\.idx; binarize a validation set"):
        fairseq_data([other])


def test_ids_need_their_dictionaries() -> None:
    corpus = {"kind": "fairseq", "source": "a", "target": "b"}
    with pytest.raises(ValueError, match=r"tokenizer\.kind = sentencepiece does not know the ids of a fairseq corpus"):
        DataConfig.model_validate({"train": [corpus], "valid": [corpus]})


def test_shards_are_byte_identical_and_an_interrupted_import_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(4, 8, 1 + number % 9).tolist(), 2] for number in range(500)]
    monkeypatch.setattr(fairseq_binary, "MAX_BLOCK_LINES", 16)
    config = fairseq_data([directory(tmp_path / "bin", train=rows)]).model_copy(update={"pairs_per_shard": 100})
    prepare(config, tmp_path / "one", workers=1)
    prepare(config, tmp_path / "two", workers=1)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert rows_of(open_dataset(tmp_path / "one", "train"), "source") == rows

    read, blocks = IdReader.read, 0

    def fails(self: IdReader, max_lines: int) -> Any:
        nonlocal blocks
        blocks += 1
        if blocks == 20:
            raise KeyboardInterrupt
        return read(self, max_lines)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IdReader, "read", fails)
        prepare(config, tmp_path / "three", workers=1)
    assert (tmp_path / "three/train/00001.arrow").exists()
    assert not (tmp_path / "three/train/00003.arrow").exists()
    prepare(config, tmp_path / "three", workers=1)
    assert tree(tmp_path / "three") == tree(tmp_path / "one")


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Ids and index are mapped: preparing 24 and 96 MB of ids holds a few blocks and one record batch."""
    peaks = []
    for number in (50_000, 200_000):
        folder = directory(tmp_path / f"bin{number}")
        index = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, 8, number) + np.full(number, 120, "<i4").tobytes()
        for side in ("en", "de"):
            np.tile(np.array([4, 5, 6] * 39 + [7, 7, 2], np.uint16), number).tofile(folder / f"train.en-de.{side}.bin")
            (folder / f"train.en-de.{side}.idx").write_bytes(index + (np.arange(number, dtype="<i8") * 240).tobytes())
        config = fairseq_data([folder])
        tracemalloc.start()
        prepare(config, tmp_path / f"data{number}", workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert load_manifest(tmp_path / f"data{number}").splits["train"].source_tokens == 120 * number
    assert peaks[1] < 1.1 * peaks[0] + 3e6, peaks
    assert peaks[1] < 30e6, peaks


@needs_golden
def test_golden_text_without_a_source(tmp_path: Path) -> None:
    """A monolingual directory: the target is its text, the source an EOS."""
    prepare(fairseq_data([GOLDEN / "data/bin_lm"]), tmp_path / "data", workers=1)
    tokenizers = load_tokenizers(tmp_path / "data/tokenizer")
    assert tokenizers.shared
    for split in ("train", "valid", "test"):
        dataset = open_dataset(tmp_path / "data", split)
        lines = (GOLDEN / f"data/raw/{split}.en").read_text().splitlines()
        kept = [[*row, 2] for row in tokenizers.target.encode(lines) if row]
        assert rows_of(dataset, "target") == kept
        assert rows_of(dataset, "source") == [[2]] * len(kept)


def test_text_in_pieces_without_its_blank_lines(tmp_path: Path) -> None:
    for name, rows in (("train", ROWS), ("train1", [[5, 2], [2]]), ("valid", [[6, 2], [2]]), ("valid1", ROWS)):
        write_mmap(tmp_path / "lm" / name, rows)
    write_dictionary(tmp_path / "lm/dict.txt", WORDS)
    config = fairseq_data([tmp_path / "lm"])
    prepare(config, tmp_path / "data", workers=1)
    assert rows_of(open_dataset(tmp_path / "data", "train"), "target") == [*[row for row in ROWS if len(row) > 1], [5, 2]]
    assert rows_of(open_dataset(tmp_path / "data", "valid"), "target") == [[6, 2]]
    assert open_dataset(tmp_path / "data", "valid").target_text(0) == "dog"
    assert list(config.test) == ["valid1"]


@needs_golden
@pytest.mark.parametrize("kind", ["sep", "joined"])
def test_golden_ids_are_the_words_of_the_raw_text(tmp_path: Path, kind: str) -> None:
    """What the predecessor's preprocess wrote, line for line, and the text that comes out of an evaluation split."""
    prepare(fairseq_data([GOLDEN / f"data/bin_{kind}"]), tmp_path / "data", workers=1)
    tokenizers = load_tokenizers(tmp_path / "data/tokenizer")
    assert tokenizers.shared == (kind == "joined")
    for split in ("train", "valid", "test"):
        dataset = open_dataset(tmp_path / "data", split)
        for side, language in (("source", "en"), ("target", "de")):
            tokenizer = getattr(tokenizers, side)
            lines = (GOLDEN / f"data/raw/{split}.{language}").read_text().splitlines()
            assert rows_of(dataset, side) == [[*row, 2] for row in tokenizer.encode(lines)]
            if split != "train":
                texts = [getattr(dataset, f"{side}_text")(row) for row in range(len(dataset))]
                words = {word for line in lines for word in line.split()}
                known = {word for word in words if tokenizer.encode([word]) != [[3]]}
                assert texts == [" ".join(word if word in known else "\u2047" for word in line.split()) for line in lines]
                assert tokenizer.encode(texts) == tokenizer.encode(lines)
