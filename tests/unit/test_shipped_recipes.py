"""What every shipped recipe and the page of jobs say, and that a recipe learns: 20 steps at toy size, on text made here.

A recipe is found by its file, so a new one is covered. Recipes of the same text share what is prepared.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest

from dstrain.checkpoint.bundle import find_bundle
from dstrain.cli.main import build_parser, main
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.recipe_file import load_recipe, recipe_names, recipe_summaries
from tests.e2e.support import events
from tests.paths import ROOT
from tests.toy_recipes import SIZES, STEPS, Toys

PAGE = (ROOT / "dstrain" / "recipes" / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("export ")
]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_learns_in_twenty_steps(name: str, toys: Toys) -> None:
    bundle = toys.bundle(name)
    losses = [event["loss"] for event in events(toys.run(name), "train")]
    assert len(losses) == STEPS == 20
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5]), losses
    assert find_bundle(bundle).description.model.model_dim == SIZES["model_dim"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_reaches_or_that_nobody_knows(name: str) -> None:
    """A figure from a run, with what it took, or the words that there was none."""
    description = load_recipe(name).description
    measured = re.search(r"\bExpected: .*\d.*\d", description, re.DOTALL)
    assert bool(measured) != ("untested at scale" in description.lower()), description


@pytest.mark.parametrize("name", ["gpt_125m", "gpt_1b3"])
def test_the_parameters_of_large_models_are_counted(name: str) -> None:
    recipe = load_recipe(f"language_modeling/{name}")
    model = build_model(recipe.model, VocabularySizes(source=32000, target=32000), seed=None)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f" {count:,} parameters" in recipe.description
    assert 19 < recipe.batching.tokens_per_step * recipe.training.max_steps / count < 21


def test_the_verb_lists_every_recipe_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(re.fullmatch(r"\S+  +[A-Z].{20,200}\.", line) for line in lines), lines
    assert recipe_summaries()["translation/multi30k_tiny"] == (
        "Transformer-Tiny (Wu et al. 2021) on Multi30k English-German: 4+4 layers, 2.3M parameters, all embeddings shared."
    )


def test_the_page_of_jobs_names_every_recipe_file_and_template() -> None:
    rows = {cell.strip() for line in PAGE.splitlines() if line.startswith("| [") for cell in line.split("|")}
    named = set(re.findall(r"`([\w/]+)`", " ".join(rows)))
    templates = {path.stem for path in (ROOT / "slurm").glob("*.sbatch")} - {"array"}
    assert named >= templates
    assert {name for name in named if "/" in name} == set(recipe_names()) - {"translation/quickstart"}
    assert named - templates - set(recipe_names()) <= {path.stem for path in (ROOT / "ds_configs").glob("*.json")}


def words_of_template(template: Path, words: list[str]) -> list[str]:
    """The command line that a template makes of its words."""
    if template.stem == "array":
        return [*words, "--shard", "0/16"]
    option = re.findall(r'--\w+ "\$4"', template.read_text().splitlines()[-1])
    recipe, data, run, *rest = words
    rest = [*option[0].split()[:1], *rest] if option else rest
    return ["train", recipe, "--data", data, "--output", run, *rest]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_of_jobs_are_understood(command: str) -> None:
    """What a template makes of its words is read as `dstrain train` reads it; tests/slurm/ submits every template."""
    program, *words = shlex.split(command.removeprefix("srun "))
    if program == "sbatch":
        place = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
        words = words_of_template(ROOT / words[place], words[place + 1 :])
    args = build_parser([words[0]]).parse_args(words)
    if "recipe" in args:
        assert load_recipe(args.recipe, args.overrides)
