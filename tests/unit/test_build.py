"""Prepared data and the recipe that is to be trained on it."""

import json
from pathlib import Path

import pytest

from dstrain.build import Corpora
from dstrain.data.prepare import prepare
from dstrain.errors import DataError
from dstrain.recipe_file import load_recipe

SMALL = ("data.train.0.num_pairs=60", "data.valid.0.num_pairs=5", "data.test={}", "data.tokenizer.vocab_size=120")


def test_data_prepared_before_a_key_existed_have_its_default(tmp_path: Path) -> None:
    recipe = load_recipe("translation/quickstart", SMALL)
    prepare(recipe.data, tmp_path / "data", workers=1)
    path = tmp_path / "data/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["data"]["tokenizer"]["tags"]
    path.write_text(json.dumps(manifest))
    assert len(Corpora(tmp_path / "data", recipe).train) == 60
    other = load_recipe("translation/quickstart", (*SMALL, "data.tokenizer.tags=[eng_Latn]"))
    with pytest.raises(DataError, match=r"data\.tokenizer\.tags: \[\] -> \(absent\)"):
        Corpora(tmp_path / "data", other)
