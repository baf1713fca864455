"""A checkpoint as an engine reads it: any range of any tensor, whatever the layout of the run that wrote it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstrain.checkpoint.fragments import Span, plan_reads
from dstrain.checkpoint.manifest import Manifest, OtherFormatError, first_problem, read_manifest
from dstrain.checkpoint.tensor_file import DTYPES, TensorFile
from dstrain.errors import CheckpointError
from dstrain.fragment import Fragment

PIECE = 1 << 24
"""Bytes that `StoredCheckpoint.pieces` reads at a time."""


class _Copy(NamedTuple):
    name: str
    start: int
    values: Tensor


class StoredCheckpoint:
    """Implements `protocols.StoredState` over the files of a verified checkpoint. Reads only the requested ranges."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._holders: dict[str, list[tuple[str, Span]]] = defaultdict(list)
        for entry in manifest.files:
            for name, fragment in entry.fragments.items():
                if name not in manifest.tensors:
                    raise CheckpointError(f"{directory}: {entry.name} holds {name}, which the manifest does not list")
                self._holders[name].append((entry.name, fragment.span(manifest.info(name))))

    @property
    def scalars(self) -> Mapping[str, Any]:
        """The engine's numbers."""
        return self.manifest.scalars

    def require(self, shapes: Mapping[str, tuple[int, ...]], *, optional: str) -> None:
        """CheckpointError unless the checkpoint holds exactly these tensors, beside those of the kind `optional`."""
        stored = {name: entry.shape for name, entry in self.manifest.tensors.items() if not name.startswith(f"{optional}/")}
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
        for name, entry in self.manifest.tensors.items():
            self._plan(name, Span(entry.shape, 0, torch.Size(entry.shape).numel()))

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
                    dtype = DTYPES[opened.info(name).dtype]
                    direct = values.device.type == "cpu" and values.dtype == dtype
                    buffer = values if direct else torch.empty(values.shape, dtype=dtype)
                    opened.read_into(name, start, buffer)
                    if not direct:
                        values.copy_(buffer)

    def read(self, name: str) -> Tensor:
        """A whole tensor, in CPU memory."""
        info = self.manifest.info(name)
        values = torch.empty(torch.Size(info.shape).numel(), dtype=DTYPES[info.dtype])
        self.fill([Fragment(name, info.shape, 0, values)])
        return values.view(info.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A whole tensor, flattened, in pieces of `PIECE` bytes at most."""
        info = self.manifest.info(name)
        dtype, size = DTYPES[info.dtype], torch.Size(info.shape).numel()
        step = PIECE // dtype.itemsize
        for start in range(0, size, step):
            values = torch.empty(min(step, size - start), dtype=dtype)
            self.fill([Fragment(name, info.shape, start, values)])
            yield values

    def names(self, kind: str) -> list[str]:
        """Names of all tensors of a kind, without the kind."""
        return [name.removeprefix(f"{kind}/") for name in self.manifest.tensors if name.startswith(f"{kind}/")]

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
        problem = first_problem(directory, manifest.files)
    except OtherFormatError:
        raise
    except (OSError, CheckpointError) as error:
        problem = str(error)
    if problem is not None:
        raise CheckpointError(f"{directory} is no whole checkpoint: {problem}; name another step_... of RUN/checkpoints")
    return StoredCheckpoint(directory, manifest)


def _listed(problem: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return [f"{problem} {', '.join(ordered[:3])}{more}"] if ordered else []
