"""Prepared data and runs of an earlier version, and the recipe that is to be trained."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from dstrain.build.same_data import require_data_of
from dstrain.build.training_plan import TrainOptions, plan_training
from dstrain.config_base import upgrade_config
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.errors import CheckpointError, DataError
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe, recipe_tree
from dstrain.training.run_directory import open_run
from tests.unit.training.fakes import ONE_PROCESS

SMALL = ("data.train.0.num_pairs=60", "data.valid.0.num_pairs=5", "data.test={}", "data.tokenizer.vocab_size=120")


def test_data_prepared_before_a_key_existed_have_its_default(tmp_path: Path) -> None:
    recipe = load_recipe("translation/quickstart", SMALL)
    prepare(recipe.data, tmp_path / "data", workers=1)
    path = tmp_path / "data/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["data"]["tokenizer"]["tags"]
    path.write_text(json.dumps(manifest))
    require_data_of(recipe, tmp_path / "data", load_manifest(tmp_path / "data"))
    other = load_recipe("translation/quickstart", (*SMALL, "data.tokenizer.tags=[eng_Latn]"))
    with pytest.raises(DataError, match=r"data\.tokenizer\.tags\[0\]: \(absent\) -> "):
        require_data_of(other, tmp_path / "data", load_manifest(tmp_path / "data"))


def test_a_run_started_before_a_key_existed_is_resumed(tmp_path: Path) -> None:
    tree = recipe_tree(load_recipe("translation/quickstart", SMALL))
    old = json.loads(json.dumps(tree))
    del old["batching"]["bucket_tokens"]
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    for name, content in (("recipe.yaml", old), ("run.json", {"format": 1, "run_id": "r", "data": "d"})):
        (tmp_path / name).write_text(json.dumps(content))
    upgrade = partial(upgrade_config, Recipe)
    with pytest.raises(CheckpointError, match=r"batching\.bucket_tokens: \(absent\) -> 4096"):
        open_run(tmp_path, tree, ONE_PROCESS, data="d")
    open_run(tmp_path, tree, ONE_PROCESS, data="d", upgrade=upgrade).close()
    tree["batching"]["bucket_tokens"] = 100
    with pytest.raises(CheckpointError, match=r"batching\.bucket_tokens: 4096 -> 100"):
        open_run(tmp_path, tree, ONE_PROCESS, data="d", upgrade=upgrade)


def test_a_tokenization_of_bleu_that_cannot_be_used_is_said_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    recipe = load_recipe("translation/quickstart", (*SMALL, "validation.tokenize=ja-mecab"))
    with pytest.raises(DataError, match="BLEU tokenization 'ja-mecab' cannot be used here"):
        plan_training(recipe, TrainOptions(data=tmp_path / "absent", output=tmp_path / "run"))
