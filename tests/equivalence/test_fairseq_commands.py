"""The command lines behind the predecessor's golden values, as recipes: its numbers of parameters and its learning rates."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dstrain.adapters.lora import adapter_targets, select
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer
from dstrain.engine.schedule import learning_rate
from dstrain.interop.fairseq.command_line.convert import recipe_from_command
from dstrain.models.config import EncoderDecoderConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.recipe import Recipe
from dstrain.recipe_file import check_recipe
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden

MODELS = sorted(path.parent.relative_to(GOLDEN) for path in [*GOLDEN.glob("ref/*/meta.json"), *GOLDEN.glob("late/*/meta.json")])
TRACES = sorted(path.stem for path in GOLDEN.glob("ref/trace/*.json"))


def golden(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def recipe_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe, made where the data directory of the command line lies."""
    monkeypatch.chdir(GOLDEN / "data")
    return check_recipe(yaml.safe_load(recipe_from_command(shlex.join(words))), "the recipe")


def vocabulary(directory: Path) -> VocabularySizes:
    names = ("dict.en.txt", "dict.de.txt") if (directory / "dict.en.txt").exists() else ("dict.txt", "dict.txt")
    source, target = (DictionaryTokenizer.from_files(directory / name).vocab_size for name in names)
    return VocabularySizes(source=source, target=target)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_models_have_the_predecessor_s_number_of_parameters(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = golden(GOLDEN / model / "meta.json")
    if "argv" not in meta:
        pytest.skip("no command line is recorded")
    recipe = recipe_of(meta["argv"], monkeypatch)
    config = recipe.model
    with torch.device("meta"):
        built = build_model(config, vocabulary(GOLDEN / "data" / meta["argv"][0]), projections="separate", seed=None)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    if config.position.kind == "learned":  # the predecessor's tables have two rows that no position uses
        parameters += 2 * config.model_dim * (2 if isinstance(config, EncoderDecoderConfig) else 1)
    assert parameters == meta["n_params"]
    adapted = [] if recipe.adapter is None else select(adapter_targets(built), recipe.adapter.targets)
    assert len(adapted) == sum(name.endswith(".lora_A") for name in meta["state_dict"])


@pytest.mark.parametrize("trace", TRACES)
def test_learning_rates_are_the_predecessor_s(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = golden(GOLDEN / f"ref/trace/{trace}.json")
    words, steps = recorded["argv"], recorded["steps"]
    if trace == "adam_cosine":  # of several cycles a recipe has the first
        words, steps = [*words, "--max-update", "9"], steps[:9]
    recipe = recipe_of(words, monkeypatch)
    found = [learning_rate(recipe.schedule, recipe.optimizer.learning_rate, step) for step in range(len(steps))]
    assert found == pytest.approx([step["lr_used"] for step in steps], rel=1e-6)
