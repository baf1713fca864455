"""The documents of a checkpoint: manifest.json, and for each rank an index of the fragments in its file of tensors.

Each rank writes and hashes its own index. So no document grows with the number of ranks times the number of tensors, and all stay
within the bounds of `storage.parsing`: a rank may hold fragments of 18,000 tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from dstrain.checkpoint.directories import MANIFEST_NAME
from dstrain.checkpoint.fragments import Span
from dstrain.checkpoint.tensor_file import DTYPES, TensorInfo
from dstrain.config_base import Config
from dstrain.errors import CheckpointError
from dstrain.fragment import DimensionSlice
from dstrain.storage.atomic import write_file
from dstrain.storage.document import Count, DocumentFormat, FileRecord
from dstrain.storage.hashing import sha256_of_json

CHECKPOINT_VERSION = 2
INDEX_NAME = re.compile(r"rank_\d+\.json")
REMEDY = "use another checkpoint, or restore this one from a copy"


class OtherFormatError(CheckpointError):
    """The checkpoint is whole, but of a format that this version does not read."""


class FragmentEntry(Config):
    """A fragment. dtype, shape: of the whole tensor. start, length, slice (dimension, start, stop): see `fragments.Span`."""

    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]
    shape: tuple[Count, ...]
    start: Count
    length: Count
    slice: tuple[Count, Count, Count] | None = None

    @property
    def info(self) -> TensorInfo:
        """Of the whole tensor."""
        return TensorInfo(self.dtype, self.shape)

    @property
    def span(self) -> Span:
        """Its elements."""
        return Span(self.shape, self.start, self.length, self.slice and DimensionSlice(*self.slice))


class FragmentIndex(Config):
    """rank_00000.json: what rank_00000.safetensors holds, by `{kind}/{parameter}`."""

    fragments: dict[str, FragmentEntry]


class Manifest(Config):
    """run_id: of the run that wrote it. layout: ranks, ZeRO stage and precision, for people. state: the trainer's; scalars: the
    engine's, each checked by its owner."""

    format: int
    run_id: str
    step: Count
    world_size: PositiveInt
    layout: str
    state: dict[str, Any]
    scalars: dict[str, Any]
    files: list[FileRecord]

    def require_run(self, directory: Path, run_id: str) -> None:
        """CheckpointError if another run wrote it."""
        if self.run_id != run_id:
            raise CheckpointError(
                f"{directory} was written by run {self.run_id}, but this is run {run_id}: move it out of the folder, or choose "
                "the --output of its run"
            )


INDEX = DocumentFormat(FragmentIndex, "index of fragments", CheckpointError, REMEDY)
_FORMAT = DocumentFormat(Manifest, "manifest of a checkpoint", CheckpointError, REMEDY)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json durably. ValueError for a number that JSON does not have."""
    content = manifest.model_dump()
    write_file(directory / MANIFEST_NAME, json.dumps({**content, "sha256": sha256_of_json(content)}, allow_nan=False).encode())


def read_manifest(directory: Path) -> Manifest:
    """Raises CheckpointError if it is missing or damaged, OtherFormatError if it is of another format."""
    path = directory / MANIFEST_NAME
    content = _FORMAT.read_tree(path)
    if content.pop("sha256", None) != sha256_of_json(content):
        raise CheckpointError(f"{path} is damaged: its content does not have the SHA-256 that it states; {REMEDY}")
    if content.get("format") != CHECKPOINT_VERSION:
        raise OtherFormatError(
            f"{path} has format {content.get('format')!r}, this dstrain reads {CHECKPOINT_VERSION}: resume with the "
            "version that wrote it, or start a new run from its last bundle (--base RUN/bundles/last)"
        )
    return _FORMAT.validate(content, path)


def verify_files(directory: Path, records: Iterable[FileRecord]) -> None:
    """CheckpointError names the first file that is not as it was written. Reads all of them."""
    for record in records:
        record.check(directory, content=True, remedy=REMEDY, error=CheckpointError)
