"""The verb text: line k of both files is pair k, whatever the texts hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.cli.main import main
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.prepare import prepare
from tests.paths import DATA
from tests.unit.data.corpus import data_config, parallel, write_lines


def test_line_breaks_inside_texts_do_not_break_lines(tmp_path: Path) -> None:
    pairs = [("the\nold dog", "the\r\ndog"), ("dog\r", "\n"), ("the\u2028dog", "dog")]
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    corpus = {"kind": "jsonl", "path": str(write_lines(tmp_path / "pairs.jsonl", lines))}
    prepare(data_config(tmp_path, test={"test": [corpus]}), tmp_path / "data", workers=1)
    assert main(["text", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    written = [(tmp_path / "out" / name).read_bytes().decode().split("\n") for name in ("source.txt", "target.txt")]
    assert written == [["the old dog", "dog ", "the\u2028dog", ""], ["the  dog", " ", "dog", ""]]
    dataset = open_dataset(tmp_path / "data", "test")
    assert [(dataset.source_text(row), dataset.target_text(row)) for row in range(3)] == pairs, "scores see the text as it is"


def test_references_are_written_so_that_evaluate_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A split may hold pairs with one reference, beside pairs with several."""
    summaries = [["the dog", "a\ndog", "dog"], ["the cat"]]
    lines = [json.dumps({"source": "the old dog", "target": own}) for own in summaries]
    path = str(write_lines(tmp_path / "pairs.jsonl", lines))
    corpora = [
        {"kind": "jsonl", "path": path, "target": "target.0", "references": "target"},
        parallel(tmp_path, "plain", ["the tree"], ["tree"]),
    ]
    prepare(data_config(tmp_path, test={"test": corpora}), tmp_path / "data", workers=1)
    dataset = open_dataset(tmp_path / "data", "test")
    assert [dataset.references(row) for row in range(3)] == [*map(tuple, summaries), ("tree",)]
    assert main(["text", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    files = [tmp_path / "out" / f"reference_{number}.txt" for number in (1, 2, 3)]
    assert [file.read_text().split("\n") for file in files] == [
        ["the dog", "the cat", "tree", ""],
        ["a dog", "", "", ""],
        ["dog", "", "", ""],
    ]
    options = [word for file in files for word in ("--reference", str(file))]
    capsys.readouterr()
    assert main(["evaluate", "--hypothesis", str(tmp_path / "out" / "target.txt"), *options, "--rouge", "plain"]) == 0
    assert "ROUGE-L    100.00  nrefs:var|" in capsys.readouterr().out


@pytest.mark.skipif(not (DATA / "scitldr").is_dir(), reason=f"no SciTLDR at {DATA}; set DSTRAIN_DATA")
def test_scitldr_is_read_as_it_is(tmp_path: Path) -> None:
    """Sources are lists of sentences, targets lists of alternative summaries: one of those in train, up to four elsewhere."""
    keys = {"kind": "jsonl", "source": "source", "target": "target.0", "join": " "}
    splits = {name: {**keys, "path": str(DATA / f"scitldr/{name}.jsonl")} for name in ("dev", "test")}
    config = data_config(
        tmp_path,
        train=[splits["dev"]],
        valid=[splits["test"]],
        tokenizer={"kind": "sentencepiece", "vocab_size": 500, "max_training_lines": 200},
    )
    report = prepare(config, tmp_path / "data", workers=1)
    assert [split.pairs_read for split in report.splits.values()] == [619, 618]
    valid = open_dataset(tmp_path / "data", "valid")
    assert valid.source_text(0).startswith("Incremental class learning involves sequentially")
    assert valid.target_text(1) == "Multi-view learning improves unsupervised sentence representation learning"
