"""Documents that dstrain writes and reads back: JSON or YAML files with a version, each a frozen pydantic model.

A `DocumentFormat` describes one kind of document; `read` either returns a valid model or raises one error that
names the file, the field, the value and the remedy. `parsing.py` bounds the cost of a damaged or hostile file.

Values are not converted (`"12"` is no number, `true` is no count), and file names cannot leave their directory: see `FileRecord`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from dstrain.config_base import Config
from dstrain.errors import DataError, DstrainError
from dstrain.storage.atomic import write_file
from dstrain.storage.explain import explain
from dstrain.storage.hashing import sha256_of_file
from dstrain.storage.parsing import MAX_JSON_VALUES, dump_yaml, read_tree

D = TypeVar("D", bound=BaseModel)
MAX_MISTAKES = 3
"""So many are reported; a damaged file may have thousands."""

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A number of things, or a position among them."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _stays_inside(name: str) -> str:
    if not name or name.startswith("/") or "\0" in name or "\\" in name or PurePosixPath(name).as_posix() != name:
        raise ValueError(f"{name!r} is no relative path with `/`; let it name a file in the directory")
    if ".." in PurePosixPath(name).parts or name == ".":
        raise ValueError(f"{name!r} leads out of the directory; let it name a file in the directory")
    return name


RelativePath = Annotated[str, AfterValidator(_stays_inside)]
"""The name of a file in the directory of its document, with `/`; it has no `..` and is not absolute."""


def path_inside(directory: Path, name: str, *, error: type[DstrainError], remedy: str) -> Path:
    """`directory / name`, where `name` is a `RelativePath`. Raises `error` if a symbolic link leads out of the directory."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise error(f"{path} leads out of {directory} through a symbolic link, to {path.resolve()}; {remedy}")
    return path


class FileRecord(Config):
    """A file in the directory of its document. size: in bytes."""

    file: RelativePath
    size: Count
    sha256: Sha256

    def check(
        self,
        directory: Path,
        *,
        content: bool,
        remedy: str = "prepare the data again",
        error: type[DstrainError] = DataError,
    ) -> Path:
        """Compare the file with this record: its size and, with `content`, its SHA-256. Raises `error` naming the file."""
        path = path_inside(directory, self.file, error=error, remedy=remedy)
        try:
            size = path.stat().st_size
        except OSError as problem:
            raise error(f"{path}: {problem.strerror}; the manifest lists this file: {remedy}") from problem
        if not path.is_file():
            raise error(f"{path} is not a file; the manifest lists it: {remedy}")
        if size != self.size:
            raise error(f"{path} holds {size} bytes, the manifest says {self.size}: it is truncated or altered; {remedy}")
        if content and sha256_of_file(path) != self.sha256:
            raise error(f"{path}: the SHA-256 differs from the manifest's: the file was altered; {remedy}")
        return path


@dataclass(frozen=True)
class DocumentFormat(Generic[D]):
    """One kind of document. name: in messages. remedy: for a file that is missing or damaged.

    version_field, version: the number that the file begins with, None for a document that belongs to another one. max_values: a
    JSON file with more is refused.
    """

    model: type[D]
    name: str
    error: type[DstrainError]
    remedy: str
    version_field: str | None = None
    version: int = 1
    max_values: int = MAX_JSON_VALUES

    def read(self, path: Path) -> D:
        """Read and check a file, `.json` or YAML. Raises `error`."""
        return self.validate(self.read_tree(path), path)

    def read_tree(self, path: Path) -> dict[str, Any]:
        """The plain values of a file of this version, not yet checked against the model. Raises `error`."""
        try:
            tree = read_tree(path, self.max_values)
        except FileNotFoundError as problem:
            raise self.error(f"{path} is missing; {self.remedy}") from problem
        except OSError as problem:
            raise self.error(f"{path} cannot be read: {problem.strerror}; {self.remedy}") from problem
        except ValueError as problem:
            kind = "JSON" if path.suffix == ".json" else "YAML"
            raise self.error(f"{path} is not valid {kind} ({problem}): it was altered; {self.remedy}") from problem
        if not isinstance(tree, dict):
            raise self.error(f"{path} holds no mapping of fields but {_shown(tree)}; {self.remedy}")
        if self.version_field is not None and tree.get(self.version_field) != self.version:
            version = _shown(tree.get(self.version_field))
            raise self.error(
                f"{path} has {self.version_field} {version}, this dstrain reads {self.version}; "
                f"use the version that wrote it, or {self.remedy}"
            )
        return tree

    def validate(self, tree: dict[str, Any], path: Path) -> D:
        """The model of plain values; `path` is named in errors."""
        try:
            return self.model.model_validate_json(json.dumps(tree), strict=True)
        except ValidationError as problem:
            lines = explain(problem, self.model)
            more = [f"and {len(lines) - MAX_MISTAKES} more"] if len(lines) > MAX_MISTAKES else []
            mistakes = "; ".join([*lines[:MAX_MISTAKES], *more])
            raise self.error(f"{path} is not a valid {self.name}: {mistakes}; {self.remedy}") from problem

    def write(self, path: Path, document: D) -> None:
        """Write a file atomically; the same document always gives the same bytes."""
        write_file(path, self.encode(path, document))

    def encode(self, path: Path, document: D) -> bytes:
        """The bytes that `write` writes."""
        if path.suffix == ".json":
            return (document.model_dump_json(indent=2) + "\n").encode()
        return dump_yaml(document.model_dump(mode="json")).encode()


def read_mapping(path: Path, *, error: type[DstrainError], remedy: str) -> dict[str, Any]:
    """A YAML or JSON file that another program of dstrain's checks, such as a saved recipe. Raises `error`."""
    return DocumentFormat(Config, "mapping", error, remedy).read_tree(path)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
