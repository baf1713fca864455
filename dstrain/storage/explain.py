"""The mistakes of a configuration in words: dotted path, value, remedy; unknown keys with the nearest valid one.

Values are shown as YAML has them. YAML reads `no`, `2016` and `1e5` as another type than their writer may think of; the message
about one says so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from dstrain.config_base import ConfigErrors
from dstrain.errors import close_to, nearest
from dstrain.storage.schema import choices_of, element_type, key_paths, kinds_of, scalar_types, union_members

EXPECTED = {
    "string_type": "a valid string",
    "int_type": "a valid integer",
    "int_parsing": "a valid integer",
    "int_from_float": "a valid integer",
    "float_type": "a valid number",
    "float_parsing": "a valid number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section",
    "model_attributes_type": "a section",
}
"""Pydantic's name of a mistake -> what the value should have been, in YAML's terms."""
MAX_PATHS = 3
"""So many keys of other sections are suggested."""


class _Location(NamedTuple):
    """A key as a user writes it (union tags left out); the model that owns it, the type of the section, and its own type."""

    path: list[str]
    owner: type[BaseModel] | None
    section: Any
    annotation: Any


def explain(error: ValidationError, model: type[BaseModel], *, yaml: bool = False) -> list[str]:
    """One line per mistake, in the order of the tree. yaml: a user wrote the values as YAML, whose traps are told."""
    details = error.errors(include_url=False)
    paths = [detail["loc"] for detail in details if detail["loc"][-1:] != ("[key]",)]
    containers = {path[:depth] for path in paths for depth in range(len(path))}
    # Pydantic also reports a list whose only item is wrong as too short.
    return [line for detail in details if detail["loc"] not in containers for line in _explain_one(detail, model, yaml)]


def shown(value: object) -> str:
    """A value in a message: as YAML has it, shortened."""
    text = _as_yaml(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_as_yaml(item)}' for key, item in value.items())}}}"
    return repr(value)


def yaml_trap(value: object, remedy: str = "put the word in quotes") -> str:
    """Why YAML gave a value that is no text, and how it becomes one; nothing for a value that is text.

    remedy: for a truth value.
    """
    if isinstance(value, bool):
        words = "yes, on and true" if value else "no, off and false"
        return f"; YAML reads {words} without quotes as {shown(value)}: {remedy}"
    if isinstance(value, int | float):
        return "; YAML reads it as a number: put it in quotes"
    return "; YAML reads null, ~ and nothing at all as null: put the text in quotes" if value is None else ""


def _explain_one(detail: Any, model: type[BaseModel], yaml: bool) -> list[str]:
    at = _follow(detail["loc"], model)
    key_path, value = ".".join(at.path), detail["input"]
    match detail["type"]:
        case "value_error":
            error = detail["ctx"]["error"]
            problems = error.problems if isinstance(error, ConfigErrors) else [str(error)]
            return [_at(at.path, problem) for problem in problems]
        case "extra_forbidden":
            text = f"unknown key; {_key_remedy(at, model)}"
        case "missing":
            choices = " or ".join(map(shown, choices_of(at.annotation)))
            text = f"missing; {f'write {choices}' if choices else 'give it a value'}"
        case "union_tag_not_found":
            text = f"missing `kind`; choose one of {_listed(kinds_of(at.annotation))}"
        case "union_tag_invalid":
            key_path, tag = f"{key_path}.kind", value["kind"]
            text = f"{shown(tag)} is unknown{yaml_trap(tag) if yaml else ''}; choose one of {_listed(kinds_of(at.annotation))}"
        case mistake:
            text = _expectation(detail, yaml)
            if detail["loc"][-1] == "[key]":
                key_path, text = ".".join(at.path[:-2]), text.replace("input", f"the key {value!r}", 1)
            else:
                text += f", not {shown(value)}"
            text += _value_remedy(mistake, value, at) if yaml else ""
    return [f"{key_path}: {text}"]


def _at(path: Sequence[str], problem: str) -> str:
    """A problem behind its key, which is written once also if the problem begins with `KEY = VALUE`."""
    if path and problem.startswith(f"{path[-1]} = "):
        return ".".join([*path[:-1], problem])
    return f"{'.'.join(path)}: {problem}" if path else problem


def _expectation(detail: Any, yaml: bool) -> str:
    """What the value should have been."""
    mistake, context = detail["type"], detail.get("ctx", {})
    if mistake in ("too_short", "too_long"):
        bound = f"least {_items(context['min_length'])}" if mistake == "too_short" else f"most {_items(context['max_length'])}"
        return f"input should be a {'mapping' if context['field_type'] == 'Dictionary' else 'list'} of at {bound}"
    if yaml and mistake in EXPECTED:
        return f"input should be {EXPECTED[mistake]}"
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _value_remedy(mistake: str, value: Any, at: _Location) -> str:
    """How a value of the wrong type, in YAML, becomes a right one."""
    remedy = ""
    match mistake:
        case "string_type":
            remedy = yaml_trap(value)
        case "literal_error":
            close = close_to(str(value), choices_of(at.annotation))
            remedy = yaml_trap(value) if isinstance(value, bool) else f"; did you mean {close[0]}?" if close else ""
        case "int_parsing" if (number := _whole_number(value)) is not None:
            remedy = f"; YAML reads it as text: write {number}"
        case "tuple_type" | "list_type" if value is not None:
            sections = isinstance(value, dict) or union_members(element_type(at.annotation))
            remedy = f"; put {'sections' if sections else 'it'} in brackets: [{'{kind: ..., ...}' if sections else value}]"
        case "dict_type" if isinstance(value, list):
            remedy = "; write NAME: VALUE lines, not a list"
        case "model_type" | "model_attributes_type":
            remedy = _section_remedy(value, at)
    return remedy


def _section_remedy(value: Any, at: _Location) -> str:
    """How a section is written where a plain value or a list stands."""
    kinds = kinds_of(at.annotation)
    if value is False and NoneType in scalar_types(at.annotation):
        return "; write null for none"
    if isinstance(value, str) and re.match(r"\w+:\S", value):
        return "; put a space after the colon"
    if value in kinds:
        return f"; write {{kind: {value}}}"
    if kinds:
        return f"; write {{kind: KIND, ...}} with a KIND of {_listed(kinds)}"
    fields = [name for member in union_members(at.annotation) for name in member.model_fields]
    return f"; its keys: {', '.join(fields)}"


def _whole_number(text: str) -> int | None:
    """The whole number that a text such as `1e5` or `10,000` means."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _key_remedy(at: _Location, model: type[BaseModel]) -> str:
    """Where an unknown key belongs: a near name, another kind of its section, another section; else the valid keys."""
    key = at.path[-1]
    own = sorted(at.owner.model_fields) if at.owner else []
    begun = [name for name in own if name.startswith(f"{key}_")]
    if close := begun or difflib.get_close_matches(key, own, n=1, cutoff=0.8):
        return f"did you mean {' or '.join(close)}?"
    kinds = [member.model_fields["kind"].default for member in union_members(at.section) if key in member.model_fields]
    if kinds:
        return f"only kind: {_listed(kinds)} has it"
    # A key of some list item, or a section, is too far from what was meant.
    paths = [path for path in key_paths(key, model) if "." in path and not {"0", "NAME"} & set(path.split("."))]
    highest = [path for path in paths if path.count(".") == paths[0].count(".")]
    return f"did you mean {' or '.join(highest[:MAX_PATHS])}?" if highest else nearest(key, own)


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(map(repr, kinds))


def _follow(location: Sequence[str | int], model: type[BaseModel]) -> _Location:
    path: list[str] = []
    annotation: Any = model
    section: Any = model
    owner: type[BaseModel] | None = model
    for step in location:
        candidates = union_members(annotation)
        tagged = [c for c in candidates if "kind" in c.model_fields and c.model_fields["kind"].default == step]
        if tagged and len(candidates) > 1:
            section, annotation = annotation, tagged[0]
            continue
        path.append(str(step))
        owner = candidates[0] if len(candidates) == 1 else None
        section = section if section is not None and owner in union_members(section) else annotation
        if owner is not None and step in owner.model_fields:
            annotation = owner.model_fields[str(step)].annotation
        else:
            annotation = element_type(annotation)
    return _Location(path, owner, section, annotation)
