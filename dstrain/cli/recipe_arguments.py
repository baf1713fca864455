"""The arguments of the verbs that read a recipe, and how they become one."""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.errors import RecipeError
from dstrain.models.config import ModelConfig
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe

BASE_HELP = "the bundle whose model a recipe without `model` has"


def add_recipe_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, base: str = "the bundle whose model a recipe without `model` has"
) -> None:
    """RECIPE, --set and --base. base: what that is for."""
    count = None if required else "?"
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs=count, help="a shipped recipe (translation/multi30k_tiny) or a YAML file"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one value, for example --set training.max_steps=100; may be repeated",
    )
    parser.add_argument("--base", metavar="BUNDLE", type=Path, help=base)


def recipe_from(args: argparse.Namespace, *, trains: bool = False) -> Recipe:
    """The checked recipe of these arguments. RecipeError for a base that gives no model, unless the verb trains on it."""
    read: list[ModelConfig] = []

    def base_model() -> ModelConfig:
        from dstrain.checkpoint.bundle import find_bundle

        read.append(find_bundle(args.base).description.model)
        return read[0]

    recipe = load_recipe(args.recipe, args.overrides, base_model=None if args.base is None else base_model)
    if args.base is not None and not read and not trains:
        raise RecipeError(f"--base {args.base} changes nothing here: the recipe has a model of its own; leave --base out")
    return recipe
