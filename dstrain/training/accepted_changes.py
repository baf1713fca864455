"""Changes of a run's recipe that decide its result, accepted by the user: of the optimizer, the schedule, and clipping.

They are recorded in run.json by dotted key. So the same command resumes again, the old value is then a change too, and every
`resume` event tells them all. Model, data and objective stay: what they changed would be another run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dstrain.errors import RecipeError, nearest

ACCEPTABLE = ("optimizer", "schedule", "engine.clip_norm")
"""Sections and keys."""


def check_accepted(keys: Iterable[str], recipe: Mapping[str, Any]) -> None:
    """Raise RecipeError for a key of --accept-changes that may not change, or that the recipe does not have."""
    for key in keys:
        if not is_acceptable(key):
            raise RecipeError(
                f"--accept-changes {key}: only keys of {', '.join(ACCEPTABLE)} may change within a run; for another one start a "
                "new run, with --base RUN/bundles/last if the model is the same"
            )
        value_at(recipe, key)


def is_acceptable(key: str) -> bool:
    """Whether a change of this key can be accepted."""
    return any(_holds(name, key) for name in ACCEPTABLE)


def is_accepted(key: str, accepted: Iterable[str]) -> bool:
    """Whether a changed key is one of the accepted, or in an accepted section."""
    return any(_holds(name, key) for name in accepted)


def option_for(keys: Sequence[str]) -> str:
    """The option that accepts changes of these keys."""
    names = dict.fromkeys(re.sub(r"\[.*", "", key) for key in keys)
    return f"--accept-changes {','.join(names)}"


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key. Raises RecipeError with the nearest key if there is none."""
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            names = value if isinstance(value, Mapping) else ()
            raise RecipeError(f"--accept-changes {key}: the recipe has no such key; {nearest(part, names)}")
        value = value[part]
    return value


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tree with other values at some dotted keys, in their order."""
    for key, value in values.items():
        tree = _with_value(tree, key, value)
    return tree


def _with_value(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    name, _, rest = key.partition(".")
    inner = tree.get(name)
    return {**tree, name: _with_value(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def _holds(name: str, key: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))
