"""Every field of every configuration is described, once, and the reference of all recipe keys is made of that."""

import importlib
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from dstrain.cli.main import main
from dstrain.config_base import Config
from dstrain.recipe_file import load_recipe, recipe_names, recipe_tree
from dstrain.recipe_reference import reference_page
from tests.paths import ROOT

MODULES = [
    "dstrain.recipe",
    *(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("dstrain/**/config.py")),
]


def configs() -> Iterator[type[Config]]:
    for name in sorted(MODULES):
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, Config) and value.__module__ == name:
                yield value


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.__name__)
def test_every_field_has_a_description_and_every_class_a_purpose(config: type[Config]) -> None:
    assert config.__doc__
    for name, field in config.model_fields.items():
        tag = name == "kind" and len(typing.get_args(field.annotation)) == 1
        assert tag != bool(field.description), f"{name}: describe it in Field(description=...); a tag is described by its class"
        assert f"{name}:" not in config.__doc__, f"{name} is described twice"
        assert tag or str(field.description).endswith("."), name


def test_the_committed_reference_is_what_the_code_generates() -> None:
    page = (ROOT / "dstrain/recipes/REFERENCE.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run: dstrain show --explain > dstrain/recipes/REFERENCE.md"


def test_the_reference_has_every_field_of_a_shipped_recipe() -> None:
    page = reference_page()
    for name in recipe_names():
        lacking = [key for key in leaf_keys(recipe_tree(load_recipe(name))) if f"| `{key}` |" not in page and key != "kind"]
        assert not lacking, name


def leaf_keys(tree: Any) -> Iterator[str]:
    if isinstance(tree, list):
        for item in tree:
            yield from leaf_keys(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key not in ("test", "layers", "directions", "weights"):  # their keys are names of the user
                yield key
                yield from leaf_keys(value)


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("training.seed", ["training.seed: integer >= 0; default 1. Decides order, initial weights and dropout."]),
        ("data.train.0.target_column", ["data.train.0.target_column: integer >= 0; default 1. Column of the target."]),
        ("data.filter.max_ratio", ["data.filter.max_ratio: number > 1 or null; default null. "]),
        ("data.test.NAME.3.path", ["text; required. The file.", "text; required. PREFIX."]),
        (
            "model.position.scaling",
            ["default kind: none", "kind: yarn: YaRN (Peng", "  factor: number >= 1; required."],
        ),
        ("model.position.kind", ["kind: rotary: Queries and keys", "kind: learned: A trained vector"]),
        ("optimizer.betas", ["[number >= 0 and < 1, number >= 0 and < 1]; default [0.9, 0.98]. "]),
        ("validation.generation", ["kind: beam, sampling or null; default kind: beam. "]),
        ("engine", ["engine: section; default its defaults. ", "  precision: fp32, bf16, fp16; default fp32."]),
    ],
)
def test_a_key_or_section_is_explained(key: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--explain", key]) == 0
    text = capsys.readouterr().out
    for line in lines:
        assert line in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--explain", "trainign.seed"], "trainign: no such key of a recipe; did you mean training?"),
        (["--explain", "model.position.tetha"], "model.position.tetha: no such key of a recipe; did you mean theta?"),
        (["--explain", "training.seed.x"], "training.seed.x: no such key of a recipe; training.seed has no keys"),
        ([], "a RECIPE is missing: name one, or --explain [KEY] for the keys of all recipes"),
    ],
)
def test_a_key_that_is_not_there_is_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *words]) == 1
    assert message in capsys.readouterr().err


def test_explaining_loads_no_torch() -> None:
    code = "import dstrain.cli.show, sys; print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
