"""recipe.yaml of a bundle: the recipe that the model was trained by. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dstrain.checkpoint.directories import RECIPE
from dstrain.errors import BundleError
from dstrain.storage.atomic import complete_version
from dstrain.storage.document import DocumentFormat


class SavedCorpus(BaseModel):
    """A corpus of recipe.yaml."""

    kind: str


class SavedData(BaseModel):
    """The `data` section of recipe.yaml."""

    train: list[SavedCorpus] = []


class SavedRecipe(BaseModel):
    """recipe.yaml, as far as a bundle's readers depend on it; `build` checks the rest."""

    description: str = ""
    data: SavedData = SavedData()
    generation: dict[str, Any] = {}


SAVED_RECIPE = DocumentFormat(SavedRecipe, "recipe", BundleError, "restore it from a copy of the bundle")


def read_recipe(bundle: Path) -> dict[str, Any] | None:
    """The recipe as plain values; None if the bundle has none. BundleError if it is damaged."""
    path = complete_version(bundle) / RECIPE
    if not path.exists():
        return None
    tree = SAVED_RECIPE.read_tree(path)
    SAVED_RECIPE.validate(tree, path)
    return tree
