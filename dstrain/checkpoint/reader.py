"""A checkpoint as an engine reads it: any range of any tensor, whatever the layout of the run that wrote it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstrain.checkpoint.directories import MANIFEST_NAME
from dstrain.checkpoint.fragments import Span, plan_reads
from dstrain.checkpoint.manifest import INDEX, INDEX_NAME, REMEDY, Manifest, read_manifest, verify_files
from dstrain.checkpoint.tensor_file import DTYPES, TensorFile, TensorInfo
from dstrain.errors import CheckpointError
from dstrain.fragment import Fragment

PIECE = 1 << 24
"""Bytes that `StoredCheckpoint.pieces` reads at a time."""


class _Copy(NamedTuple):
    name: str
    start: int
    values: Tensor


class StoredCheckpoint:
    """Implements `fragment.StoredState` over the files of a verified checkpoint. Reads only the requested ranges.

    tensors: dtype and shape of every whole tensor, by `{kind}/{parameter}`. Raises CheckpointError if the indices contradict each
    other or their files.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.tensors: dict[str, TensorInfo] = {}
        self._holders: dict[str, list[tuple[str, Span]]] = defaultdict(list)
        sizes = {record.file: record.size for record in manifest.files}
        for index in filter(INDEX_NAME.fullmatch, sizes):
            file, num_bytes = index.replace(".json", ".safetensors"), 0
            for name, entry in INDEX.read(directory / index).fragments.items():
                info = self.tensors.setdefault(name, entry.info)
                if info != entry.info:
                    raise CheckpointError(f"{directory / index}: {name} is {entry.info}, in another index it is {info}; {REMEDY}")
                self._holders[name].append((file, entry.span))
                num_bytes += entry.length * DTYPES[entry.dtype].itemsize
            if num_bytes > sizes.get(file, 0):
                raise CheckpointError(
                    f"{directory / index}: its fragments take {num_bytes} bytes, which {file} does not hold; {REMEDY}"
                )

    @property
    def path(self) -> Path:
        """Of the manifest, for messages."""
        return self.directory / MANIFEST_NAME

    @property
    def scalars(self) -> Mapping[str, Any]:
        """The engine's numbers."""
        return self.manifest.scalars

    def require(self, shapes: Mapping[str, tuple[int, ...]], *, optional: str) -> None:
        """CheckpointError unless the checkpoint holds exactly these tensors, beside those of the kind `optional`."""
        stored = {name: info.shape for name, info in self.tensors.items() if not name.startswith(f"{optional}/")}
        problems = [
            *_listed("it lacks", shapes.keys() - stored.keys()),
            *_listed("this run has no", stored.keys() - shapes.keys()),
            *_listed("of another shape:", (name for name in shapes.keys() & stored.keys() if shapes[name] != stored[name])),
        ]
        if problems:
            raise CheckpointError(
                f"{self.directory} does not fit this run: {'; '.join(problems)}; resume with the recipe it was saved with, or "
                "start a new run from its last bundle"
            )

    def require_coverage(self) -> None:
        """CheckpointError unless every element of every tensor is stored once."""
        for name, info in self.tensors.items():
            self._plan(name, Span(info.shape, 0, math.prod(info.shape)))

    def fill(self, fragments: Iterable[Fragment]) -> None:
        """Copy stored values into the fragments, one file after another."""
        copies: dict[str, list[_Copy]] = defaultdict(list)
        for fragment in fragments:
            needed = Span(fragment.shape, fragment.start, fragment.values.numel(), fragment.slice)
            for file, start, offset, length in self._plan(fragment.name, needed):
                copies[file].append(_Copy(fragment.name, start, fragment.values[offset : offset + length]))
        for file, pieces in copies.items():
            with TensorFile(self.directory / file) as opened:
                for name, start, values in pieces:
                    dtype = DTYPES[self.tensors[name].dtype]
                    direct = values.device.type == "cpu" and values.dtype == dtype
                    buffer = values if direct else torch.empty(values.shape, dtype=dtype)
                    opened.read_into(name, start, buffer)
                    if not direct:
                        values.copy_(buffer)

    def read(self, name: str) -> Tensor:
        """A whole tensor, in CPU memory."""
        info = self.tensors[name]
        values = torch.empty(math.prod(info.shape), dtype=DTYPES[info.dtype])
        self.fill([Fragment(name, info.shape, 0, values)])
        return values.view(info.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A whole tensor, flattened, in pieces of `PIECE` bytes at most."""
        info = self.tensors[name]
        dtype, size = DTYPES[info.dtype], math.prod(info.shape)
        step = PIECE // dtype.itemsize
        for start in range(0, size, step):
            values = torch.empty(min(step, size - start), dtype=dtype)
            self.fill([Fragment(name, info.shape, start, values)])
            yield values

    def names(self, kind: str) -> list[str]:
        """Names of all tensors of a kind, without the kind."""
        return [name.removeprefix(f"{kind}/") for name in self.tensors if name.startswith(f"{kind}/")]

    def whole(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind by name, without the kind."""
        return {name: self.read(f"{kind}/{name}") for name in self.names(kind)}

    def _plan(self, name: str, needed: Span) -> list[tuple[str, int, int, int]]:
        """File, start in its tensor, start in the needed fragment, and length, of each read."""
        holders = self._holders[name]
        reads = plan_reads(name, needed, [span for _, span in holders])
        return [(holders[source][0], start, offset, length) for source, start, offset, length in reads]


def open_checkpoint(directory: Path) -> StoredCheckpoint:
    """Open a checkpoint after comparing every file with its hash. Raises CheckpointError."""
    try:
        manifest = read_manifest(directory)
        verify_files(directory, manifest.files)
        return StoredCheckpoint(directory, manifest)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}; {REMEDY}") from error


def _listed(problem: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return [f"{problem} {', '.join(ordered[:3])}{more}"] if ordered else []
