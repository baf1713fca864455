"""Whether prepared data is that of a recipe; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.config_base import upgrade_config
from dstrain.data.config import DataConfig
from dstrain.data.prepared.comparison import other_content, settings_of
from dstrain.data.prepared.job import without_tasks
from dstrain.data.prepared.manifest import DataManifest
from dstrain.errors import DataError
from dstrain.recipe import Recipe
from dstrain.recipe_file import recipe_tree
from dstrain.training.run_directory import tree_changes


def require_data_of(recipe: Recipe, directory: Path, manifest: DataManifest) -> None:
    """DataError unless this is the data of the recipe, wherever that finds its files; test sets do not count."""
    prepared, requested = _sections(recipe, manifest)
    changes = tree_changes({"data": settings_of(prepared)}, {"data": settings_of(requested)})
    lines = [f"  {key}: {change}" for key, change in changes.items()]
    lines = lines or list(other_content(directory, manifest, DataConfig.model_validate(prepared), recipe.data))
    if lines:
        raise DataError(
            f"{directory} was prepared from another data section than this recipe's:\n"
            + "\n".join(lines)
            + "\nundo these changes, or prepare the data again into another directory"
        )


def moved_text(recipe: Recipe, manifest: DataManifest) -> str | None:
    """How the recipe spells what was prepared from elsewhere; None if it is spelled the same."""
    sections = ({"data": {key: side[key] for key in ("train", "valid")}} for side in _sections(recipe, manifest))
    return "; ".join(f"{key}: {change}" for key, change in tree_changes(*sections).items()) or None


def _sections(recipe: Recipe, manifest: DataManifest) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The data section that was prepared, and that of the recipe, as preparation reads both."""
    return without_tasks(upgrade_config(DataConfig, manifest.data)), without_tasks(recipe_tree(recipe)["data"])
