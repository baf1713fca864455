"""manifest.json of a checkpoint: which tensors it holds, which ranges of them lie in which file, and the hash of every file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, ValidationError

from dstrain.checkpoint.fragments import Span
from dstrain.checkpoint.tensor_file import TensorInfo
from dstrain.config_base import Config
from dstrain.errors import CheckpointError
from dstrain.fragment import DimensionSlice
from dstrain.storage.atomic import write_file
from dstrain.storage.document import Count, RelativePath, Sha256
from dstrain.storage.explain import explain
from dstrain.storage.hashing import sha256_of_file, sha256_of_json
from dstrain.storage.parsing import read_tree

CHECKPOINT_VERSION = 2
MANIFEST_NAME = "manifest.json"
MAX_VALUES = 20_000_000
"""One fragment has three values, and every rank may hold one of every tensor."""


class OtherFormatError(CheckpointError):
    """The checkpoint is whole, but of a format that this version does not read."""


class FragmentRange(Config):
    """The position of a fragment in its tensor; see `fragments.Span`. slice: dimension, start, stop."""

    start: Count
    length: Count
    slice: tuple[Count, Count, Count] | None = None

    def span(self, info: TensorInfo) -> Span:
        """The fragment of a tensor."""
        return Span(info.shape, self.start, self.length, self.slice and DimensionSlice(*self.slice))


class FileEntry(Config):
    """One file. name: relative to the checkpoint, with `/`. fragments: by tensor, for a file of tensors."""

    name: RelativePath
    size: Count
    sha256: Sha256
    fragments: dict[str, FragmentRange] = Field(default_factory=dict)

    def problem(self, directory: Path) -> str | None:
        """The fault of the file, None for a sound one. Reads it whole."""
        path = directory / self.name
        if not path.is_file():
            return f"missing file {self.name}"
        if not path.resolve().is_relative_to(directory.resolve()):
            return f"file {self.name} is a link out of the checkpoint"
        size = path.stat().st_size
        if size < self.size:
            return f"truncated file {self.name}: {size} of {self.size} bytes"
        if size > self.size:
            return f"file {self.name} has grown"
        if sha256_of_file(path) != self.sha256:
            return f"hash mismatch in {self.name}: its bytes are not those that were written"
        return None


class TensorEntry(Config):
    """Dtype, as safetensors names it, and shape of a whole tensor."""

    dtype: str
    shape: tuple[Count, ...]


class Manifest(Config):
    """run_id: of the run that wrote it. layout: ranks, ZeRO stage and precision, for people. state: the trainer's; scalars: the
    engine's. tensors: by `{kind}/{parameter}`."""

    format: int
    run_id: str
    step: Count
    world_size: PositiveInt
    layout: str
    state: dict[str, Any]
    scalars: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: list[FileEntry]

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        return TensorInfo(self.tensors[name].dtype, self.tensors[name].shape)

    def require_run(self, directory: Path, run_id: str) -> None:
        """CheckpointError if another run wrote it."""
        if self.run_id != run_id:
            raise CheckpointError(
                f"{directory} was written by run {self.run_id}, but this is run {run_id}: move it out of the folder, or choose "
                "the --output of its run"
            )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json durably. ValueError for a number that JSON does not have."""
    content = manifest.model_dump(exclude_defaults=True)
    write_file(directory / MANIFEST_NAME, json.dumps({**content, "sha256": sha256_of_json(content)}, allow_nan=False).encode())


def read_manifest(directory: Path) -> Manifest:
    """Raises CheckpointError if it is missing or damaged, OtherFormatError if it is of another format."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(f"missing {MANIFEST_NAME}")
    try:
        content: Any = read_tree(path, MAX_VALUES)
        sound = content.pop("sha256") == sha256_of_json(content)
    except (ValueError, AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{MANIFEST_NAME} is damaged")
    if content.get("format") != CHECKPOINT_VERSION:
        raise OtherFormatError(
            f"{path} has format {content.get('format')!r}, this dstrain reads {CHECKPOINT_VERSION}: resume with the "
            "version that wrote it, or start a new run from its last bundle (--base RUN/bundles/last)"
        )
    try:
        return Manifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST_NAME}: {explain(error, Manifest)[0]}") from error


def first_problem(directory: Path, entries: Iterable[FileEntry]) -> str | None:
    """The fault of the first file that is not as it was written."""
    return next(filter(None, (entry.problem(directory) for entry in entries)), None)
