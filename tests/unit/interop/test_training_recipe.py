"""The recipe of an imported checkpoint: the settings of its training, from every container that fairseq saved them in."""

from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.bundle import find_bundle
from dstrain.interop.fairseq.checkpoint import read_fairseq_checkpoint
from dstrain.interop.fairseq.importing import FairseqImport, import_checkpoint
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe
from tests.paths import GOLDEN, needs_golden
from tests.unit.interop.fairseq_checkpoints import AbsentModules, dictionaries, small_weights

PAIR = {"source_lang": "en", "target_lang": "de", "data": "far/away"}


def made(modules: AbsentModules, folder: Path, layout: str) -> Path:
    torch.manual_seed(3)
    weights, path = small_weights(), folder / "checkpoint.pt"
    if layout == "old":
        return modules.old_checkpoint(path, weights, task="translation", **PAIR)
    return modules.new_checkpoint(path, weights, {"_name": "translation", **PAIR}, omegaconf=layout == "omegaconf")


@pytest.mark.parametrize("layout", ["old", "groups", "omegaconf"])
def test_every_layout_gives_the_same_recipe(layout: str, tmp_path: Path, modules: AbsentModules) -> None:
    path = made(modules, tmp_path, layout)
    lines = import_checkpoint(FairseqImport(path, tmp_path / "b", dictionaries(tmp_path, 11, 13)))
    state = "optimizer_history, extra_state, last_optimizer_state"
    assert f"left out {state}: state of the training that made it; a new training has its own" in lines
    recipe = load_recipe(str(tmp_path / "b" / "recipe.yaml"))
    assert isinstance(recipe, Recipe)
    assert recipe.model == find_bundle(tmp_path / "b").description.model
    assert (recipe.model.dropout, recipe.objective.label_smoothing, recipe.engine.clip_norm) == (0.25, 0.2, 0.5)
    assert recipe.optimizer.model_dump() | {
        "kind": "adamw",
        "learning_rate": 0.002,
        "betas": (0.9, 0.98),
        "eps": 1e-9,
        "weight_decay": 0.001,
        "decay": "all",
    } == (recipe.optimizer.model_dump())
    assert recipe.schedule.model_dump() | {"kind": "inverse_sqrt", "warmup_steps": 30, "warmup_init": 1e-7} == (
        recipe.schedule.model_dump()
    )
    assert (recipe.batching.tokens_per_step, recipe.batching.max_tokens) == (600, 300)
    assert (recipe.training.max_steps, recipe.training.seed) == (40, 5)
    assert recipe.data.filter.max_source_length == 300
    assert recipe.data.tokenizer.model_dump()["path"] == str((tmp_path / "b" / "tokenizer").resolve())
    assert any("replace PAIRS.tsv in data by yours" in line for line in lines)


def test_settings_that_make_no_recipe_leave_the_bundle(tmp_path: Path, modules: AbsentModules) -> None:
    checkpoint = read_fairseq_checkpoint(made(modules, tmp_path, "groups"))
    torch.save({"cfg": {**checkpoint.settings, "dataset": {}}, "model": checkpoint.weights}, tmp_path / "bare.pt")
    lines = import_checkpoint(FairseqImport(tmp_path / "bare.pt", tmp_path / "b", dictionaries(tmp_path, 11, 13)))
    assert any("no recipe.yaml: " in line and "neither --max-tokens nor --batch-size" in line for line in lines)
    assert find_bundle(tmp_path / "b").recipe() is None


@needs_golden
def test_binarized_data_beside_the_dictionaries_are_the_recipes(tmp_path: Path) -> None:
    folder = GOLDEN / "ref/toy_train"
    import_checkpoint(FairseqImport(folder / "checkpoint_last.pt", tmp_path / "b", GOLDEN / "data/bin_sep"))
    recipe = load_recipe(str(tmp_path / "b" / "recipe.yaml"))
    assert [corpus.kind for corpus in recipe.data.train] == ["fairseq"]
    assert recipe.data.tokenizer.kind == "fairseq_dictionaries"


@needs_golden
def test_an_adapter_keeps_its_settings(tmp_path: Path) -> None:
    path = GOLDEN / "ref/j_lora_r4/checkpoint.pt"
    lines = import_checkpoint(FairseqImport(path, tmp_path / "b", GOLDEN / "data/bin_sep"))
    assert any(f"--base {tmp_path / 'b' / 'base'} " in line for line in lines)
    recipe = load_recipe(str(tmp_path / "b" / "recipe.yaml"))
    assert recipe.adapter is not None
    assert recipe.adapter.rank == 4
    assert find_bundle(tmp_path / "b" / "base").recipe() is None
