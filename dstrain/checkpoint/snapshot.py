"""A checkpoint is written in two steps: `take_snapshot` copies a rank's share into CPU memory, `Snapshot.write` writes it.

Training may go on as soon as the copy is made: `write` touches no engine and communicates with no rank, so it can run in a
thread. Cost: host memory for one copy of this rank's masters, moments and moving average, 12 to 16 bytes a parameter divided by
the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dstrain.checkpoint.manifest import FileEntry, FragmentRange
from dstrain.checkpoint.tensor_file import TensorInfo, file_order, info_of, write_tensors
from dstrain.fragment import Fragment
from dstrain.protocols import Resumable
from dstrain.storage.atomic import sync
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

    def tensors(self) -> dict[str, TensorInfo]:
        """Dtype and shape of the whole tensors that this rank holds fragments of."""
        return {fragment.name: TensorInfo(info_of(fragment.values).dtype, fragment.shape) for fragment in self.fragments}

    def write(self, directory: Path) -> list[FileEntry]:
        """Write and sync the files of this rank. Raises OSError if the disk refuses."""
        entries = []
        if self.fragments:
            by_name = {fragment.name: fragment for fragment in self.fragments}
            infos = {name: info_of(fragment.values) for name, fragment in by_name.items()}
            path = directory / f"rank_{self.rank:05d}.safetensors"
            size, digest = write_tensors(path, infos, (by_name[name].values for name in file_order(infos)))
            ranges = {name: FragmentRange(start=f.start, length=f.values.numel(), slice=f.slice) for name, f in by_name.items()}
            entries.append(FileEntry(name=path.name, size=size, sha256=digest, fragments=ranges))
        if self.template is not None:
            (directory / TEMPLATE).mkdir()
            self.template(directory / TEMPLATE)
            for path in sorted(path for path in (directory / TEMPLATE).rglob("*") if path.is_file()):
                name = path.relative_to(directory).as_posix()
                entries.append(FileEntry(name=name, size=path.stat().st_size, sha256=sha256_of_file(path)))
        for entry in entries:
            sync(directory / entry.name)
        return entries


def take_snapshot(engine: Resumable, rank: int, template: WriteTemplate | None) -> Snapshot:
    """Copy what `rank` has to write. The engine may train on afterwards. No communication."""
    copies = [fragment._replace(values=fragment.values.to("cpu", copy=True)) for fragment in engine.fragments()]
    names = [fragment.name for fragment in copies]
    if len(set(names)) != len(names):
        raise ValueError("a rank writes one fragment per tensor")
    return Snapshot(rank, copies, template if rank == 0 else None)
