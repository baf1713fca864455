"""Recipes on disk: found by name or path, `extends` at any depth, `--set` overrides, duplicate keys refused.

A merge goes key by key through sections. A mapping of names that the user chooses (`data.test`) is replaced, as a list is; so is
a section whose `kind` changes, because its other keys belonged to the old kind. `null` empties a section, a list or a mapping:
it has its default again. `description` is about one file and is not inherited. Every mistake of a recipe is reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel, ValidationError

from dstrain.arguments import require_path, require_texts
from dstrain.config_base import Tree
from dstrain.engine.config import EngineConfig
from dstrain.engine.ds_config import read_ds_config
from dstrain.errors import RecipeError, close_to, nearest
from dstrain.models.config import ModelConfig
from dstrain.models.presets import PRESETS
from dstrain.recipe import RECIPE_VERSION, Recipe
from dstrain.storage.explain import explain, shown, yaml_trap
from dstrain.storage.parsing import dump_yaml, parse_yaml, read_tree
from dstrain.storage.schema import container_types, element_type, scalar_types, union_members
from dstrain.training.horizons import Horizons

SHIPPED = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes: `translation/multi30k_tiny`."""
    return sorted(str(path.relative_to(SHIPPED).with_suffix("")) for path in SHIPPED.glob("*/*.yaml"))


def recipe_summaries() -> dict[str, str]:
    """The shipped recipes by name, each with the first sentence of its description."""
    descriptions = {name: " ".join(_read(SHIPPED / f"{name}.yaml")["description"].split()) for name in recipe_names()}
    return {name: re.split(r"(?<=\.) (?=[A-Z])", text)[0] for name, text in descriptions.items()}


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, base_model: Callable[[], ModelConfig] | None = None
) -> Recipe:
    """Read, merge, override and check a recipe.

    name_or_path: a shipped name or a YAML file. overrides: `a.b=value` with a YAML value; list items by number.
    base_model: gives the model of the bundle to start from, for a recipe without one or with `model.from_base: true`.
    Raises RecipeError with every mistake found.
    """
    path = _find(str(require_path("name_or_path", name_or_path)))
    tree = _read_extended(path)
    mistakes: list[str] = []
    for override in require_texts("overrides", overrides):
        try:
            _override(tree, override)
        except RecipeError as error:
            mistakes.append(str(error))
    tree = _cleaned(_with_preset(tree, mistakes, base_model), [Recipe], "", mistakes)
    return check_recipe(tree, str(path), mistakes + _deepspeed_mistakes(tree))


def check_recipe(tree: Mapping[str, Any], origin: str, mistakes: Sequence[str] = ()) -> Recipe:
    """The checked recipe of a tree of plain values. origin: its name in errors. mistakes: found before, reported too."""
    if tree.get("version", RECIPE_VERSION) != RECIPE_VERSION:
        version = tree["version"]
        raise RecipeError(f"{origin}: version: this dstrain reads recipes of version {RECIPE_VERSION}, not {shown(version)}")
    lines = list(mistakes)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        known = {line.partition(": ")[0] for line in mistakes}
        lines += [line for line in explain(error, Recipe, yaml=True) if line.partition(": ")[0] not in known]
    else:
        lines += Horizons(recipe).errors()
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        sections = sum(line.endswith(": missing; give it a value") and "." not in line for line in lines)
        hint = ["(`extends: translation/multi30k_tiny` takes the missing sections from that recipe)"] if sections > 1 else []
        if "model: missing; give it a value" in lines:
            hint.append("(with --base BUNDLE `model` may be left out: it is the bundle's)")
        raise RecipeError("\n  ".join([f"{origin}: {count}", *lines, *hint]))
    return recipe


def recipe_tree(recipe: Recipe) -> Tree:
    """The resolved recipe as plain values, every default written out."""
    return recipe.model_dump(mode="json")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return dump_yaml(recipe_tree(recipe), width=120)


def merge(base: Mapping[str, Any], top: Mapping[str, Any], sections: Sequence[type[BaseModel]] = (Recipe,)) -> Tree:
    """`top` over `base`, key by key as far as there are sections; a section of another kind or of a preset replaces the old one.

    sections: the configurations that both trees may be.
    """
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        inner = [member for annotation in _annotations(sections, key) for member in union_members(annotation)]
        if inner and isinstance(old, Mapping) and isinstance(value, Mapping) and _same_part(old, value):
            merged[key] = merge(old, value, inner)
        else:
            merged[key] = value
    return merged


def _same_part(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    preset = PRESETS.get(str(old.get("preset")))
    old_kind = old.get("kind", preset.kind if preset else None)
    return "preset" not in new and new.get("kind", old_kind) == old_kind


def _annotations(sections: Sequence[type[BaseModel]], key: str) -> list[Any]:
    return [section.model_fields[key].annotation for section in sections if key in section.model_fields]


def _with_preset(tree: Tree, mistakes: list[str], base_model: Callable[[], ModelConfig] | None) -> Tree:
    """The tree with `model.preset` or `from_base` replaced by the keys of that model, over which the other keys of `model` go."""
    model = tree.get("model")
    if model is None and base_model is not None:
        model = {"from_base": True}
    if isinstance(model, dict) and "from_base" in model:
        own = {key: value for key, value in model.items() if key not in {"from_base", "preset"}}
        if "preset" in model:
            mistakes.append("model.preset: model.from_base names the architecture, too; leave one of the two out")
        if model["from_base"] is not True:
            mistakes.append(f"model.from_base: input should be true, not {shown(model['from_base'])}; or leave it out")
        if base_model is None:
            mistakes.append("model.from_base: no base is named; add --base BUNDLE")
        config = next(iter(PRESETS.values())) if base_model is None else base_model()  # any: the other keys are still checked
        return {**tree, "model": _over(config, own, "the base", mistakes)}
    if not isinstance(model, dict) or "preset" not in model:
        return tree
    name = model["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        trap = yaml_trap(name) or f"; {nearest(str(name), PRESETS)}"
        mistakes.append(f"model.preset: no preset {shown(name)}{trap}")
        name = next(iter(PRESETS))  # any: the other keys are still checked
    own = {key: value for key, value in model.items() if key != "preset"}
    return {**tree, "model": _over(PRESETS[name], own, f"the preset {name}", mistakes)}


def _over(config: ModelConfig, own: Tree, origin: str, mistakes: list[str]) -> Tree:
    """The keys of a recipe over those of a model, which decides the kind."""
    if own.get("kind", config.kind) != config.kind:
        mistakes.append(f"model.kind: {origin} is of kind {config.kind}, not {shown(own['kind'])}; leave one of the two out")
    return merge(config.model_dump(mode="json"), {**own, "kind": config.kind}, union_members(ModelConfig))


def _cleaned(value: Any, annotations: Sequence[Any], path: str, mistakes: list[str]) -> Any:
    """A value without nulls that empty a part. A truth value in place of a number, which converts, is a mistake."""
    scalars = {kind for annotation in annotations for kind in scalar_types(annotation)}
    if isinstance(value, bool) and scalars & {int, float} and bool not in scalars:
        mistakes.append(f"{path}: input should be a valid number, not {shown(value)}{yaml_trap(value, 'give a number')}")
    elements = [element_type(annotation) for annotation in annotations]
    if isinstance(value, list):
        return [_cleaned(item, elements, f"{path}.{number}", mistakes) for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    sections = [member for annotation in annotations for member in union_members(annotation)]
    cleaned = {}
    for key, inner in value.items():
        types = _annotations(sections, key) if sections else elements
        if inner is not None or not _empties(types):
            cleaned[key] = _cleaned(inner, types, f"{path}.{key}" if path else key, mistakes)
    return cleaned


def _empties(annotations: Sequence[Any]) -> bool:
    """Whether null is no value of these types, and they are sections, lists or mappings."""
    parts = any(union_members(annotation) or container_types(annotation) for annotation in annotations)
    return parts and all(NoneType not in scalar_types(annotation) for annotation in annotations)


def _deepspeed_mistakes(tree: Tree) -> list[str]:
    """The mistakes of the DeepSpeed file that the recipe names, as far as the recipe's engine section is readable."""
    try:
        engine = EngineConfig.model_validate(tree.get("engine", {}))
    except ValidationError:
        return []
    try:
        read_ds_config(engine)
    except RecipeError as error:
        return str(error).splitlines()
    return []


def _read_extended(path: Path, children: tuple[Path, ...] = ()) -> Tree:
    """The tree of a file over the trees of all that it extends. children: the files that lead here."""
    if path.resolve() in [child.resolve() for child in children]:
        circle = " -> ".join(map(str, (*children, path)))
        raise RecipeError(f"{children[0]}: extends leads in a circle: {circle}; leave one of them out")
    tree = _read(path)
    if wrong := [key for key in tree.keys() - Recipe.model_fields.keys() - {"extends"} if close_to(key, ["extends"])]:
        raise RecipeError(f"{path}: {wrong[0]}: unknown key; did you mean extends?")
    names = tree.pop("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{path}: extends: give a recipe or a list of recipes, not {shown(names)}")
    merged: Tree = {}
    for name in names:
        base = _read_extended(_find(name, child=path), (*children, path))
        merged = merge(merged, {key: value for key, value in base.items() if key != "description"})
    return merge(merged, tree)


def _find(name_or_path: str, child: Path | None = None) -> Path:
    """The file of a recipe. child: the file that extends it, beside which it is looked for first."""
    path = Path(name_or_path).expanduser()
    beside = [child.parent / path] if child is not None else []
    shipped = [SHIPPED / f"{path}.yaml"] if name_or_path in recipe_names() else []
    for candidate in (*beside, *shipped, path):
        if candidate.is_file():
            return candidate
    meant = next(filter(None, map(_near_file, (*beside, path))), None) or nearest(str(path), recipe_names())
    origin = "" if child is None else f"{child}: extends: "
    raise RecipeError(f"{origin}recipe {name_or_path!r}: no shipped recipe and no file of that name; {meant}")


def _near_file(path: Path) -> str | None:
    """What was meant by a path without a file: a recipe in that directory, or a file beside it."""
    if (path / "recipe.yaml").is_file():
        return f"did you mean {path / 'recipe.yaml'}?"
    if path.is_dir() and path != Path():
        return f"it is a directory; name a file in it, or one of {', '.join(recipe_names())}"
    files = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    named = [file for file in files if Path(file).stem.lower() == path.stem.lower()]
    close = named or difflib.get_close_matches(path.name, files, n=1, cutoff=0.7)
    return f"did you mean {path.parent / close[0]}?" if close else None


def _read(path: Path) -> Tree:
    try:
        tree = read_tree(path)
    except ValueError as error:
        raise RecipeError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}; fix the file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; make it readable") from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections, not {shown(tree)}; write lines such as `training: {{max_steps: 5}}`"
        )
    return tree


def _override(tree: Tree, override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write it as section.key=value")
    if not text.strip():
        raise RecipeError(f"--set {override}: the value is missing; write null for none, or '' in quotes for empty text")
    if keys == ["extends"]:
        raise RecipeError(f"--set {override}: only a file extends a recipe; write `extends: {text}` into one of your own")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        reason = re.sub(r"^line \d+, column \d+: ", "", str(error))
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value ({reason}); quote it") from None
    if re.search(r"\s#", text) and "#" not in str(value):
        raise RecipeError(f"--set {override}: YAML reads a comment from ' #' on; put the value in quotes")
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = _enter(node, key, override, ".".join(keys[: depth + 1]))
    _assign(node, keys[-1], value, override)


def _enter(node: Any, key: str, override: str, path: str) -> Any:
    at: Any = _index(node, key, override) if isinstance(node, list) else key
    inner = node[at] if isinstance(node, list) else node.get(key)
    if inner is None:
        node[at] = inner = {}
    if not isinstance(inner, dict | list):
        raise RecipeError(f"--set {override}: {path} is the value {shown(inner)}, which has no keys")
    return inner


def _assign(node: Any, key: str, value: Any, override: str) -> None:
    if isinstance(node, list):
        node[_index(node, key, override)] = value
    elif key == "preset":
        node.clear()  # a preset brings all keys of its section
        node[key] = value
    else:
        node[key] = value


def _index(node: list[Any], key: str, override: str) -> int:
    if not (key.isascii() and key.isdigit()) or int(key) >= len(node):
        raise RecipeError(
            f"--set {override}: {key!r} is no item of a list of {len(node)}; items count from 0; to add one, give the whole list"
        )
    return int(key)
