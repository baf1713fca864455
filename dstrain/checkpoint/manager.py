"""Checkpoints that a kill at any moment cannot spoil.

```
RUN/checkpoints/
  step_00000100/   manifest.json, rank_00000.json, rank_00000.safetensors, ..., template/
  step_00000200/
  latest           the name of the newest one
```
Every rank writes the fragments that it owns into `step_00000300.tmp/` (snapshot.py), hashed on the way, and forces them to the
disk; rank 0 writes the manifest, renames the folder and then the pointer. So a folder without `.tmp` is complete, and a manifest
that does not fit its files means damage that came later. Loading verifies every hash, which costs one read of the files, shared
among the ranks, and steps back to an older checkpoint with a warning that says why. Any number of ranks reads what any other
number has written. The folder must be visible to all ranks.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from dstrain.checkpoint.manifest import (
    CHECKPOINT_VERSION,
    Manifest,
    OtherFormatError,
    read_manifest,
    verify_files,
    write_manifest,
)
from dstrain.checkpoint.reader import StoredCheckpoint
from dstrain.checkpoint.snapshot import WriteTemplate, take_snapshot
from dstrain.errors import CheckpointError, DstrainError
from dstrain.log import logger
from dstrain.parallel.errors import raise_on_all_ranks
from dstrain.protocols import Ranks, Resumable
from dstrain.storage.atomic import sync, write_file
from dstrain.storage.document import FileRecord

_R = TypeVar("_R")
POINTER = "latest"
NAME = re.compile(r"step_\d{8,}")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. layout: of the run that wrote it. state: the JSON object that was saved with it."""

    directory: Path
    step: int
    world_size: int
    layout: str
    state: dict[str, Any]


class CheckpointManager:
    """Writes, finds, verifies and prunes the checkpoints of one run. Every public method is collective.

    directory: the same on all ranks. keep: how many of the newest stay. run_id: checkpoints of another run are refused. template:
    writes a bundle without weights, so that `dstrain consolidate` needs nothing but the checkpoint.
    """

    def __init__(self, directory: Path, ranks: Ranks, *, keep: int, run_id: str, template: WriteTemplate | None = None) -> None:
        self.directory = directory
        self.ranks = ranks
        self.keep = keep
        self.run_id = run_id
        self.template = template
        self.latest: Path | None = None
        self._damaged: set[str] = set()

    def save(self, step: int, engine: Resumable, state: Mapping[str, Any]) -> Path:
        """Write checkpoint `step`, publish it, then remove those beyond `keep`.

        state: any value that JSON can hold, floats included bit for bit. Raises CheckpointError on every rank if one of them
        fails; the checkpoints that exist stay, and unfinished files are removed.
        """
        final = self.directory / f"step_{step:08d}"
        aside = final.with_name(final.name + ".tmp")
        doing = f"saving {final}"
        try:
            self._on_first_rank(doing, partial(_make_empty, aside))
            snapshot = self._on_all_ranks(doing, partial(take_snapshot, engine, self.ranks.rank, self.template))
            records = self._on_all_ranks(doing, partial(snapshot.write, aside))
            manifest = self._describe(step, engine, state, self.ranks.gather_objects(records))
            self._on_first_rank(doing, partial(_commit_directory, aside, final, manifest))
        except DstrainError as error:
            if self.ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            kept = f"the last complete checkpoint is {self.latest}" if self.latest else "no checkpoint was complete before it"
            raise CheckpointError(f"{error}; {kept}; free space or repair the disk, then start again to resume") from error
        self.latest = final
        self._damaged.discard(final.name)
        self._on_first_rank(f"removing old checkpoints in {self.directory}", self._prune)
        return final

    def load_latest(self, engine: Resumable) -> Checkpoint | None:
        """Load the newest checkpoint whose files are all as they were written; None if there has never been one.

        Raises CheckpointError if checkpoints exist but none is usable: training never starts over beside them. A checkpoint
        of another run or format is refused, not skipped.
        """
        self._on_first_rank(f"clearing {self.directory}", self._remove_leftovers)
        candidates, pointer_problem = self.ranks.broadcast_object(self._candidates() if self.ranks.rank == 0 else ([], None))
        if pointer_problem:
            self._warn(pointer_problem)
        for name in candidates:
            directory = self.directory / name
            problem = self._first_problem(directory)
            if problem is None:
                manifest = read_manifest(directory)
                manifest.require_run(directory, self.run_id)
                self._on_all_ranks(f"loading {directory}", partial(_load, engine, directory, manifest))
                engine.sync()
                self.latest = directory
                return Checkpoint(directory, manifest.step, manifest.world_size, manifest.layout, manifest.state)
            self._warn(f"skipping checkpoint {directory}: {problem}")
            self._damaged.add(name)
        if candidates or pointer_problem:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is usable (the warnings above say why): restore one from a copy, "
                "or choose another --output to train from the beginning"
            )
        return None

    def _describe(self, step: int, engine: Resumable, state: Mapping[str, Any], records: list[list[FileRecord]]) -> Manifest:
        return Manifest(
            format=CHECKPOINT_VERSION,
            run_id=self.run_id,
            step=step,
            world_size=self.ranks.size,
            layout=engine.layout,
            state=dict(state),
            scalars=engine.scalars(),
            files=sorted(chain.from_iterable(records), key=lambda record: record.file),
        )

    def _on_all_ranks(self, doing: str, action: Callable[[], _R]) -> _R:
        return raise_on_all_ranks(self.ranks, CheckpointError, doing, action)

    def _on_first_rank(self, doing: str, action: Callable[[], object]) -> None:
        raise_on_all_ranks(self.ranks, CheckpointError, doing, action if self.ranks.rank == 0 else lambda: None)

    def _warn(self, text: str) -> None:
        if self.ranks.rank == 0:
            logger.warning("%s", text)

    def _candidates(self) -> tuple[list[str], str | None]:
        """Names to try, best first, and the fault of the pointer, if any."""
        names = sorted((path.name for path in self._complete()), key=_step_of, reverse=True)
        pointer = self.directory / POINTER
        if not pointer.is_file():
            return names, f"the pointer {pointer} is missing" if names else None
        named = pointer.read_text(errors="replace").strip()
        if named not in names:
            return names, f"the pointer {pointer} names no checkpoint: {named!r}"
        return [named, *(name for name in names if name != named)], None

    def _complete(self) -> list[Path]:
        return [path for path in self.directory.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob("*.tmp"):
            logger.info("removing %s, which an earlier process left half written", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _first_problem(self, directory: Path) -> str | None:
        """The fault of a checkpoint, agreed by all ranks, each of which verifies its share of the files."""
        try:
            verify_files(directory, read_manifest(directory).files[self.ranks.rank :: self.ranks.size])
            problem = None
        except OtherFormatError:
            raise
        except (OSError, CheckpointError) as error:
            problem = str(error)
        if self.ranks.all_true(problem is None):
            return None
        return next(filter(None, self.ranks.gather_objects(problem)))

    def _prune(self) -> None:
        """Keep the one just written and the newest before it; later ones are of a damaged or abandoned run."""
        assert self.latest is not None
        paths = sorted(self._complete(), key=lambda path: _step_of(path.name))
        sound = [p for p in paths if p.name not in self._damaged and _step_of(p.name) <= _step_of(self.latest.name)]
        for path in set(paths) - set(sound[-self.keep :]):
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", path, error)
        self._damaged.clear()


def _step_of(name: str) -> int:
    return int(name.removeprefix("step_"))


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _load(engine: Resumable, directory: Path, manifest: Manifest) -> None:
    engine.load(StoredCheckpoint(directory, manifest))


def _commit_directory(aside: Path, final: Path, manifest: Manifest) -> None:
    if [record.file for record in manifest.files] != _files(aside):
        raise OSError(f"the ranks see different files in {aside}: the shared file system lags behind")
    StoredCheckpoint(aside, manifest).require_coverage()
    write_manifest(aside, manifest)
    for folder in (path for path in aside.rglob("*") if path.is_dir()):
        sync(folder)
    sync(aside)
    if final.exists():
        shutil.rmtree(final)
    os.rename(aside, final)  # noqa: PTH104
    sync(final.parent)
    write_file(final.parent / POINTER, f"{final.name}\n".encode())
