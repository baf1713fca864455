"""Arguments of Python callers, checked in one place before anything uses them: which argument, which item, of what type.

The command line reads its own arguments; what it passes on goes through the same checks. Torch-free.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Set, Sized
from operator import index
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dstrain.errors import ArgumentError


class CheckedOptions:
    """Base of frozen dataclasses of options: every field has its declared type, or becomes it (a text a path, a list a tuple).

    Raises ArgumentError that names the field. A device may be a `torch.device`.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = vars(self)[name]
            if name == "device" or isinstance(value, os.PathLike):
                value = str(value)
            try:
                object.__setattr__(self, name, TypeAdapter(hint).validate_python(value))
            except ValidationError as error:
                detail = error.errors(include_url=False)[0]
                path = ".".join(map(str, (f"{type(self).__name__}.{name}", *detail["loc"])))
                expected = "input should be a path" if detail["type"] == "path_type" else detail["msg"]
                raise ArgumentError(f"{path}: {expected[:1].lower()}{expected[1:]}, not {_shown(detail['input'])}") from error


def check_device_name(name: str) -> str:
    """The name of a device, which need not be here. ArgumentError for any other text."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise ArgumentError(f"device {name!r} is unknown; choose cpu, cuda, cuda:N or auto")
    return name


def require_type(name: str, value: object, kind: type, remedy: str = "") -> None:
    """ArgumentError, with a remedy that begins with a semicolon, unless the value is a `kind`."""
    if not isinstance(value, kind):
        raise ArgumentError(f"{name} is {_kind_of(value)} ({_shown(value)}), not {kind.__name__}{remedy}")


def require_path(name: str, value: object) -> Path:
    """A path, from a text or a path."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ArgumentError(f"{name} = {_shown(value)} is no path; give a text or a Path")
    return Path(value)


def require_texts(name: str, value: object) -> list[str]:
    """A list of texts, from any ordered collection of them. ArgumentError names the first item that is none."""
    texts = _items(name, value, "texts")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ArgumentError(f"{name}[{number}] is {_kind_of(text)} ({_shown(text)}); give a text")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ArgumentError(
                f"{name}[{number}] ({_shown(text)}) holds half a surrogate pair, which is no character; decode it anew"
            )
    return texts


def require_ids(name: str, value: object, vocab_size: int, limit: int) -> list[list[int]]:
    """Rows of 1 to `limit` token ids, from any ordered collections of whole numbers, arrays and tensors among them.

    ArgumentError names the first row or id that is not one of the vocabulary.
    """
    rows = [_items(f"{name}[{number}]", row, "ids") for number, row in enumerate(_items(name, value, "rows of ids"))]
    for number, row in enumerate(rows):
        if not 1 <= len(row) <= limit:
            raise ArgumentError(f"{name}[{number}] has {len(row)} ids; the model reads 1 to {limit}")
        for position, token in enumerate(row):
            where = f"{name}[{number}][{position}]"
            try:
                row[position] = _whole(token)
            except TypeError as error:
                raise ArgumentError(f"{where} is {_kind_of(token)} ({_shown(token)}); give a whole number") from error
            if not 0 <= row[position] < vocab_size:
                raise ArgumentError(f"{where} = {_shown(token)} is no id of the vocabulary, which has 0 to {vocab_size - 1}")
    return rows


def require_same_number(name: str, first: Sized, other_name: str, second: Sized) -> None:
    """ArgumentError unless there is one of the second for each of the first."""
    if len(first) != len(second):
        raise ArgumentError(f"{len(first)} {name} but {len(second)} {other_name}; give one for each")


def _items(name: str, value: object, what: str) -> list[Any]:
    if isinstance(value, str | bytes):
        raise ArgumentError(f"{name} = {_shown(value)} is one {_kind_of(value)}; give a list of {what}")
    if not isinstance(value, Iterable) or isinstance(value, Mapping | Set):
        raise ArgumentError(f"{name} is {_kind_of(value)} ({_shown(value)}); give a list of {what}")
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a mask is no row of ids")
    return index(value)


def _kind_of(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
