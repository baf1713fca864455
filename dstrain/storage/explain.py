"""The mistakes of a configuration in words: dotted path, value, remedy; unknown keys with the nearest valid one."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from dstrain.errors import nearest


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per mistake, in the order of the tree."""
    details = error.errors(include_url=False)
    containers = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    # Pydantic also reports a list whose only item is wrong as too short.
    return [_explain_one(detail, model) for detail in details if detail["loc"] not in containers]


def _explain_one(detail: Any, model: type[BaseModel]) -> str:
    path, owner = _follow(detail["loc"], model)
    key_path = ".".join(path)
    message = detail["msg"].removeprefix("Value error, ")
    match detail["type"]:
        case "extra_forbidden":
            return f"{key_path}: unknown key; {nearest(path[-1], owner.model_fields if owner else ())}"
        case "missing":
            return f"{key_path}: missing; give it a value"
        case "value_error":
            return f"{key_path}: {message}" if key_path else message
        case "union_tag_not_found":
            return f"{key_path}: missing `kind`; choose one of {detail['ctx'].get('expected_tags', _tags_at(owner, path))}"
        case "union_tag_invalid":
            tags, tag = detail["ctx"]["expected_tags"], detail["ctx"]["tag"]
            return f"{key_path}.kind: {tag!r} is unknown; choose one of {tags}"
    return f"{key_path}: {message[:1].lower()}{message[1:]}, not {detail['input']!r}"


def _tags_at(owner: type[BaseModel] | None, path: Sequence[str]) -> str:
    if owner is None or path[-1] not in owner.model_fields:
        return "the documented kinds"
    kinds = union_members(owner.model_fields[path[-1]].annotation)
    return ", ".join(repr(kind.model_fields["kind"].default) for kind in kinds if "kind" in kind.model_fields)


def _follow(location: Sequence[str | int], model: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The path as a user writes it (union tags left out), and the model that owns its last key."""
    path: list[str] = []
    annotation: Any = model
    owner: type[BaseModel] | None = model
    for step in location:
        candidates = union_members(annotation)
        tagged = [c for c in candidates if "kind" in c.model_fields and c.model_fields["kind"].default == step]
        if tagged and len(candidates) > 1:
            annotation = tagged[0]
            continue
        path.append(str(step))
        owner = candidates[0] if len(candidates) == 1 else None
        if owner is not None and step in owner.model_fields:
            annotation = owner.model_fields[str(step)].annotation
        else:
            annotation = element_type(annotation)
    return path, owner


def union_members(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation admits directly (through Annotated, unions and None)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (tuple, list, dict):
        return []
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        arguments = arguments[:1]
    return [member for argument in arguments for member in union_members(argument)]


def element_type(annotation: Any) -> Any:
    """The type of the items of a tuple, list or dict."""
    arguments = [argument for argument in typing.get_args(annotation) if argument is not Ellipsis]
    return arguments[-1] if arguments else None
