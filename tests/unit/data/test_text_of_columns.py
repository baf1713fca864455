"""Text is whatever has one column: the same lines of every kind of corpus are the same shards, and have a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dstrain.checkpoint.task import task_of
from dstrain.data.config import DataConfig, is_text_only, is_text_tree
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tasks.config import Denoising, LanguageModeling
from dstrain.errors import RecipeError
from dstrain.models.config import DecoderOnlyConfig
from dstrain.recipe_file import dump_recipe, load_recipe
from tests.unit.data.corpus import sentences

LINES = [*sentences(30), "", *sentences(50)[30:]]
DENOISING = {"kind": "denoising", "mask": 0.5}
KINDS = ("text", "tsv", "jsonl", "parquet", "huggingface")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The lines as a corpus of each kind; all but plain text have another column, which nobody reads."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text").write_text("".join(f"{line}\n" for line in LINES))
    (folder / "tsv").write_text("".join(f"{number}\t{line}\n" for number, line in enumerate(LINES)))
    (folder / "jsonl").write_text("".join(json.dumps({"id": [], "page": {"body": line}}) + "\n" for line in LINES))
    (folder / "set").mkdir()
    table = pa.table({"id": range(len(LINES)), "page": [{"body": line} for line in LINES]})
    pq.write_table(table, folder / "set" / "train.parquet")
    fields = {"source": None, "target": "page.body"}
    return {
        "text": {"path": str(folder / "text")},
        "tsv": {"path": str(folder / "tsv"), "source_column": None},
        "jsonl": {"path": str(folder / "jsonl"), **fields},
        "parquet": {"path": str(folder / "set" / "train.parquet"), **fields},
        "huggingface": {"dataset": str(folder / "set"), **fields},
    }


def data_of(kind: str, corpus: Mapping[str, Any]) -> dict[str, Any]:
    tree = {"kind": kind, **corpus}
    tokenizer = {"kind": "sentencepiece", "vocab_size": 70, "user_symbols": ["<mask>"]}
    return {"train": [{**tree, "task": DENOISING}], "valid": [tree], "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def shards_of_text(corpora: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return shards(data_of("text", corpora["text"]), tmp_path_factory.mktemp("text") / "data")


def shards(data: Mapping[str, Any], directory: Path) -> dict[str, bytes]:
    config = DataConfig.model_validate(data)
    assert [corpus.text_task for corpus in (*config.train, *config.valid)] == [Denoising(mask=0.5), LanguageModeling()]
    prepare(config, directory, workers=1, progress=False)
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(directory.rglob("*.arrow"))}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_column_is_text(
    kind: str,
    corpora: dict[str, dict[str, Any]],
    shards_of_text: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "huggingface":
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert shards(data_of(kind, corpora[kind]), tmp_path / "data") == shards_of_text
    assert sorted(shards_of_text) == ["train/00000.arrow", "valid/00000.arrow"]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_pairs_have_no_task(kind: str, corpora: dict[str, dict[str, Any]]) -> None:
    pairs = {key: value for key, value in corpora[kind].items() if not key.startswith("source")}
    tree = data_of(kind, pairs)
    with pytest.raises(ValidationError, match=r"task is for text without a source; leave it out, or choose no source"):
        DataConfig.model_validate(tree)
    del tree["train"][0]["task"]
    config = DataConfig.model_validate(tree)
    assert not is_text_only(config.train[0])
    assert config.train[0].text_task is None


def test_a_recipe_of_columns_survives_its_file_and_makes_a_language_model(
    corpora: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    corpus = {"kind": "jsonl", **corpora["jsonl"]}
    keys = [f"data.{split}=[{json.dumps(corpus)}]" for split in ("train", "valid")]
    recipe = load_recipe("language_modeling/wikitext_tiny", keys)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe
    assert again.data.train[0].text_task == LanguageModeling()
    with pytest.raises(
        RecipeError, match=r"data\.train\.0 is text without a source \(kind: jsonl\), so an encoder has nothing to"
    ):
        load_recipe("translation/multi30k_tiny", [*keys, "data.test={}"])


@pytest.mark.parametrize(
    ("corpus", "continues"),
    [
        ({"kind": "jsonl", "source": None, "target": "body"}, True),
        ({"kind": "jsonl", "source": None, "target": "body", "task": None}, True),
        ({"kind": "tsv", "source_column": None, "task": {"kind": "language_modeling"}}, True),
        ({"kind": "parquet", "source": None, "task": {"kind": "prefix_lm"}}, False),
        ({"kind": "jsonl"}, False),
        ({"kind": "tsv", "source_column": 0, "task": None}, False),
    ],
)
def test_the_task_of_a_model_follows_from_its_columns(corpus: dict[str, Any], *, continues: bool) -> None:
    model = DecoderOnlyConfig(model_dim=8, decoder={"depth": 1, "num_heads": 2, "ffn_dim": 8})
    assert task_of(model, {"data": {"train": [corpus]}}) == ("continuation" if continues else "translation")
    assert is_text_tree(corpus) == (continues or "prefix_lm" in str(corpus))
