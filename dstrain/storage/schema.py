"""The types of a configuration, seen from outside: its sections, lists and mappings, and where a key stands in the tree."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel


def union_members(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation admits directly (through Annotated, unions and None)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (tuple, list, dict):
        return []
    return [member for argument in _alternatives(annotation) for member in union_members(argument)]


def container_types(annotation: Any) -> list[Any]:
    """The list or mapping types that an annotation admits directly."""
    if typing.get_origin(annotation) in (tuple, list, dict):
        return [annotation]
    return [container for argument in _alternatives(annotation) for container in container_types(argument)]


def scalar_types(annotation: Any) -> set[Any]:
    """The types of plain values that an annotation admits directly, `NoneType` included."""
    if typing.get_origin(annotation) in (tuple, list, dict):
        return set()
    if typing.get_origin(annotation) is typing.Literal:
        return {type(choice) for choice in typing.get_args(annotation)}
    alternatives = _alternatives(annotation)
    return {kind for argument in alternatives for kind in scalar_types(argument)} if alternatives else {annotation}


def choices_of(annotation: Any) -> list[Any]:
    """The values of the `Literal` that an annotation admits directly, if any."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for argument in _alternatives(annotation) for choice in choices_of(argument)]


def element_type(annotation: Any) -> Any:
    """The type of the items of a tuple, list or dict, which may be one of several alternatives; None without one."""
    containers = container_types(annotation)
    arguments = [argument for argument in typing.get_args(containers[0]) if argument is not Ellipsis] if containers else []
    return arguments[-1] if arguments else None


def nested_sections(annotation: Any, key: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections that a value of this type holds, with their keys: `0` is an item of a list, NAME an entry of a mapping."""
    for member in union_members(annotation):
        yield key, member
    for container in container_types(annotation):
        item = "NAME" if typing.get_origin(container) is dict else "0"
        yield from nested_sections(element_type(container), f"{key}.{item}")


def kinds_of(annotation: Any) -> list[str]:
    """The `kind` of each section that an annotation admits, where kinds tell them apart."""
    kinds = [member.model_fields["kind"].default for member in union_members(annotation) if "kind" in member.model_fields]
    return kinds if len(kinds) > 1 else []


def key_paths(name: str, model: type[BaseModel], prefix: str = "") -> list[str]:
    """The keys called `name` in a tree of sections, the highest first."""
    paths: list[str] = []
    for field, info in model.model_fields.items():
        if field == name:
            paths.append(prefix + field)
        for key, member in nested_sections(info.annotation, prefix + field):
            paths += key_paths(name, member, f"{key}.")
    return sorted(dict.fromkeys(paths), key=lambda path: path.count("."))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return arguments[:1]
    return () if typing.get_origin(annotation) is typing.Literal else arguments
