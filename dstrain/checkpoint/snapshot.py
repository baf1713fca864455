"""A checkpoint is written in two steps: `take_snapshot` copies a rank's share into CPU memory, `Snapshot.write` writes it.

Training may go on as soon as the copy is made: `write` touches no engine and communicates with no rank, so it can run in a
thread. Cost: host memory for one copy of this rank's masters, moments and moving average, 12 to 16 bytes a parameter divided by
the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dstrain.checkpoint.manifest import INDEX, FragmentEntry, FragmentIndex
from dstrain.checkpoint.tensor_file import info_of, save_tensors
from dstrain.fragment import Fragment
from dstrain.protocols import Resumable
from dstrain.storage.atomic import sync
from dstrain.storage.document import FileRecord
from dstrain.storage.hashing import sha256_of_file

TEMPLATE = "template"
"""Folder of a checkpoint with the files of a bundle except the weights."""
WriteTemplate = Callable[[Path], None]
"""Writes a bundle without weights into an empty directory."""


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint, independent of the engine. template: given on rank 0 only."""

    rank: int
    fragments: list[Fragment]
    template: WriteTemplate | None

    def write(self, directory: Path) -> list[FileRecord]:
        """Write and sync the files of this rank. Raises OSError if the disk refuses."""
        records, others = [], []
        if self.fragments:
            path = directory / f"rank_{self.rank:05d}.safetensors"
            size, digest = save_tensors(path, {fragment.name: fragment.values for fragment in self.fragments})
            records.append(FileRecord(file=path.name, size=size, sha256=digest))
            others.append(path.with_suffix(".json"))
            INDEX.write(others[0], FragmentIndex(fragments={fragment.name: _entry(fragment) for fragment in self.fragments}))
        if self.template is not None:
            (directory / TEMPLATE).mkdir()
            self.template(directory / TEMPLATE)
            others += sorted(path for path in (directory / TEMPLATE).rglob("*") if path.is_file())
        for path in others:
            name = path.relative_to(directory).as_posix()
            records.append(FileRecord(file=name, size=path.stat().st_size, sha256=sha256_of_file(path)))
        for record in records:
            sync(directory / record.file)
        return records


def _entry(fragment: Fragment) -> FragmentEntry:
    dtype, (length,) = info_of(fragment.values)
    return FragmentEntry(dtype=dtype, shape=fragment.shape, start=fragment.start, length=length, slice=fragment.slice)


def take_snapshot(engine: Resumable, rank: int, template: WriteTemplate | None) -> Snapshot:
    """Copy what `rank` has to write. The engine may train on afterwards. No communication."""
    copies = [fragment._replace(values=fragment.values.to("cpu", copy=True)) for fragment in engine.fragments()]
    names = [fragment.name for fragment in copies]
    if len(set(names)) != len(names):
        raise ValueError("a rank writes one fragment per tensor")
    return Snapshot(rank, copies, template if rank == 0 else None)
