"""Two-tag source lines (`eng_Latn deu_Latn text`), from text to translation and distillation, with both kinds of tokenizer."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import SentencePieceTokenizer, load_tokenizers
from dstrain.data.tokenizers.training import train_sentencepiece
from tests.e2e.support import RECIPE, SMALL_TRAINING, dstrain, events, settings, succeeds
from tests.unit.data.corpus import sentences, write_lines

TAGS = ["eng_Latn", "deu_Latn", "hin_Deva"]


def corpus(folder: Path, name: str, number: int) -> dict[str, str]:
    """Copies or reversals of sentences: the second tag says which."""
    choose = random.Random(number)
    source, target = [], []
    for sentence in sentences(number):
        tag = choose.choice(TAGS[1:])
        source.append(f"{choose.choice(TAGS[:2])} {tag} {sentence}")
        target.append(sentence if tag == "deu_Latn" else " ".join(sentence.split()[::-1]))
    paths = [write_lines(folder / f"{name}.{side}", lines) for side, lines in (("source", source), ("target", target))]
    return {"kind": "parallel", "source": str(paths[0]), "target": str(paths[1])}


def dictionary_tokenizer(folder: Path) -> dict[str, Any]:
    """What IndicTrans2 has: a SentencePiece model of untagged text, and dictionaries, the source's with the tags."""
    model = train_sentencepiece(sentences(100), TrainedSentencePiece(vocab_size=60))
    (folder / "spm.model").write_bytes(model)
    pieces = SentencePieceTokenizer(model).tokens(range(4, 60))
    write_lines(folder / "dict.SRC.txt", [f"{symbol} 1" for symbol in (*pieces, *TAGS)])
    write_lines(folder / "dict.TGT.txt", [f"{symbol} 1" for symbol in pieces])
    names = {"source": "dict.SRC.txt", "target": "dict.TGT.txt", "source_model": "spm.model", "target_model": "spm.model"}
    return {"kind": "fairseq_dictionaries", **{key: str(folder / name) for key, name in names.items()}, "tags": ["???_????"]}


@pytest.mark.parametrize("kind", ["sentencepiece", "fairseq_dictionaries"])
def test_tags_are_single_first_tokens_from_text_to_translation(tmp_path: Path, kind: str) -> None:
    tree = yaml.safe_load(succeeds(dstrain("show", RECIPE, *settings(*SMALL_TRAINING))).stdout)
    tokenizer = {"kind": kind, "vocab_size": 64, "tags": TAGS} if kind == "sentencepiece" else dictionary_tokenizer(tmp_path)
    tree["data"] = {
        "train": [corpus(tmp_path, "train", 200)],
        "valid": [corpus(tmp_path, "valid", 20)],
        "tokenizer": tokenizer,
    }
    tree["model"]["embedding"]["tie"] = "decoder"
    recipe, data, run = tmp_path / "recipe.yaml", tmp_path / "data", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(tree))
    succeeds(dstrain("prepare", recipe, "--output", data))
    source = load_tokenizers(data / "tokenizer").source
    ids = [source.encode([tag])[0] for tag in TAGS]
    assert all(len(row) == 1 for row in ids)
    lines = (tmp_path / "train.source").read_text().splitlines()
    train = open_dataset(data, "train")
    for row, line in enumerate(lines):
        first, second, *_ = line.split()
        assert train[row].source[:2].tolist() == [*ids[TAGS.index(first)], *ids[TAGS.index(second)]]
        assert not np.isin(train[row].source[2:], ids).any()
    succeeds(dstrain("train", recipe, "--data", data, "--output", run, "--device", "cpu", "--set", "training.max_steps=4"))
    result = dstrain("generate", run / "bundles/last", "--input", tmp_path / "valid.source", "--output", tmp_path / "out")
    succeeds(result)
    assert len((tmp_path / "out").read_text().splitlines()) == 20

    by_language = "{kind: global_by_language, rate: 0.5, queue_size: 30, tags: [eng_Latn, deu_Latn]}"
    distil = settings(f"objective={{kind: distillation, selection: {by_language}}}", "training.max_steps=4")
    student = ("--data", data, "--output", tmp_path / "student", "--teacher", run / "bundles/last", "--device", "cpu")
    succeeds(dstrain("train", recipe, *student, *distil))
    selected = [event["selected"] for event in events(tmp_path / "student", "train")]
    assert len(selected) == 4
    assert all(0 < share < 1 for share in selected)
