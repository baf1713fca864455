"""Recipes on disk: found by name or path, one `extends` level, `--set` overrides, duplicate keys refused.

A merge goes key by key; if the `kind` of a section changes, the section is replaced whole, because its other keys belonged to the
old kind. Every mistake of a recipe is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dstrain.config_base import Tree
from dstrain.engine.config import EngineConfig
from dstrain.engine.ds_config import resolve_ds_config
from dstrain.errors import RecipeError, nearest
from dstrain.models.presets import PRESETS
from dstrain.recipe import RECIPE_VERSION, Recipe
from dstrain.storage.explain import explain
from dstrain.storage.parsing import dump_yaml, parse_yaml, read_tree

SHIPPED = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes: `translation/multi30k_tiny`."""
    return sorted(str(path.relative_to(SHIPPED).with_suffix("")) for path in SHIPPED.glob("*/*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, override and check a recipe.

    name_or_path: a shipped name or a YAML file. overrides: `a.b=value` with a YAML value; list items by number.
    Raises RecipeError with every mistake found.
    """
    path = _find(name_or_path)
    tree = _read(path)
    if "extends" in tree:
        base_path = _find(str(tree.pop("extends")), beside=path)
        base = _read(base_path)
        if "extends" in base:
            raise RecipeError(f"{path}: extends {base_path}, which itself extends another recipe; only one level is read")
        tree = merge(base, tree)
    mistakes = []
    for override in overrides:
        try:
            _override(tree, override)
        except RecipeError as error:
            mistakes.append(str(error))
    return check_recipe(_with_preset(tree), str(path), mistakes + _deepspeed_mistakes(tree))


def check_recipe(tree: Mapping[str, Any], origin: str, mistakes: Sequence[str] = ()) -> Recipe:
    """The checked recipe of a tree of plain values. origin: its name in errors. mistakes: found before, reported too."""
    if tree.get("version", RECIPE_VERSION) != RECIPE_VERSION:
        version = tree["version"]
        raise RecipeError(f"{origin}: version: this dstrain reads recipes of version {RECIPE_VERSION}, not {version!r}")
    lines = list(mistakes)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        lines += explain(error, Recipe)
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError("\n  ".join([f"{origin}: {count}", *lines]))
    return recipe


def recipe_tree(recipe: Recipe) -> Tree:
    """The resolved recipe as plain values, every default written out."""
    return recipe.model_dump(mode="json")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return dump_yaml(recipe_tree(recipe), width=120)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    """`top` over `base`, key by key; a part of another kind or of a preset replaces the old one whole."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_part(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _same_part(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "preset" not in new and new.get("kind", old.get("kind")) == old.get("kind")


def _with_preset(tree: Tree) -> Tree:
    """The tree with `model.preset` replaced by the preset's keys, over which the other keys of `model` go."""
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return tree
    name = str(model["preset"])
    if name not in PRESETS:
        raise RecipeError(f"model.preset: no preset {name!r}; {nearest(name, PRESETS)}")
    own = {key: value for key, value in model.items() if key != "preset"}
    return {**tree, "model": merge(PRESETS[name].model_dump(mode="json"), own)}


def _deepspeed_mistakes(tree: Tree) -> list[str]:
    """The mistakes of the DeepSpeed file that the recipe names, as far as the recipe's engine section is readable."""
    try:
        engine = EngineConfig.model_validate(tree.get("engine", {}))
    except ValidationError:
        return []
    try:
        resolve_ds_config(engine, replicas=1)
    except RecipeError as error:
        return [str(error)]
    return []


def _find(name_or_path: str, beside: Path | None = None) -> Path:
    candidates = [SHIPPED / f"{name_or_path}.yaml", Path(name_or_path)]
    if beside is not None:
        candidates.insert(0, beside.parent / name_or_path)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    hint = nearest(name_or_path, recipe_names())
    raise RecipeError(f"recipe {name_or_path!r}: no shipped recipe and no file of that name; {hint}")


def _read(path: Path) -> Tree:
    try:
        tree = read_tree(path)
    except ValueError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}; fix the file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; make it readable") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, not {type(tree).__name__}; write `section:` lines")
    return tree


def _override(tree: Tree, override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write it as section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value; quote it") from None
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = _enter(node, key, override, ".".join(keys[: depth + 1]))
    _assign(node, keys[-1], value, override)


def _enter(node: Any, key: str, override: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if not isinstance(node.get(key), dict | list):
        if node.get(key) is not None:
            raise RecipeError(f"--set {override}: {path} is the value {node[key]!r}, which has no keys")
        node[key] = {}
    return node[key]


def _assign(node: Any, key: str, value: Any, override: str) -> None:
    if isinstance(node, list):
        node[_index(node, key, override)] = value
    elif key == "preset":
        node.clear()  # a preset brings all keys of its section
        node[key] = value
    else:
        node[key] = value


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise RecipeError(f"--set {override}: {key!r} is no item of a list of {len(node)}; items count from 0")
    return int(key)
