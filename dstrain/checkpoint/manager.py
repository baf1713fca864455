"""Checkpoints that a kill at any moment cannot spoil.

```
RUN/checkpoints/
  step_00000100/   manifest.json and whatever the engine wrote
  step_00000200/
  latest           the name of the newest one
```
All ranks write into `step_00000300.tmp/`, force their bytes to the disk and hash them; rank 0 writes the manifest, renames the
folder and then the pointer. So a folder without `.tmp` is complete, and a manifest that does not fit its files means damage
that came later. Loading verifies every hash before the engine unpickles anything, and steps back to an older checkpoint with a
warning that says why. Hashing costs one read of the files at saving and one at loading, shared among the ranks. The folder must
be visible to all ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dstrain.errors import CheckpointError, DstrainError
from dstrain.log import logger
from dstrain.parallel.errors import raise_on_all_ranks
from dstrain.protocols import Ranks, Shardable
from dstrain.storage.atomic import sync, write_file
from dstrain.storage.hashing import sha256_of_file, sha256_of_json

R = TypeVar("R")
FORMAT = 1
MANIFEST = "manifest.json"
POINTER = "latest"
NAME = re.compile(r"step_\d{8,}")


@dataclass(frozen=True)
class FileEntry:
    """What the manifest promises of one file. name: relative to the checkpoint, with `/`."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. state: the JSON object that was saved with it."""

    directory: Path
    step: int
    world_size: int
    state: dict[str, Any]


class CheckpointManager:
    """Writes, finds, verifies and prunes the checkpoints of one run. Every public method is collective.

    directory: the same on all ranks. keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, ranks: Ranks, *, keep: int) -> None:
        self.directory = directory
        self.ranks = ranks
        self.keep = keep
        self.latest: Path | None = None
        self._damaged: set[str] = set()

    def save(self, step: int, engine: Shardable, state: Mapping[str, Any]) -> Path:
        """Write checkpoint `step`, publish it, then remove those beyond `keep`.

        state: whatever JSON can hold, floats included bit for bit. Raises CheckpointError on every rank where one of them
        fails; the checkpoints that exist stay, and what was half written is removed.
        """
        final = self.directory / f"step_{step:08d}"
        aside = final.with_name(final.name + ".tmp")
        doing = f"saving {final}"
        try:
            self._on_first_rank(doing, partial(_make_empty, aside))
            self._on_all_ranks(doing, partial(engine.save_shards, aside))
            entries = self._on_all_ranks(doing, partial(_seal, aside, self.ranks))
            gathered = self.ranks.gather_objects(entries)
            manifest = {"format": FORMAT, "step": step, "world_size": self.ranks.size, "state": dict(state)}
            self._on_first_rank(doing, partial(_publish, aside, final, manifest, gathered))
        except DstrainError as error:
            if self.ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            kept = f"the last complete checkpoint is {self.latest}" if self.latest else "no checkpoint was complete before it"
            raise CheckpointError(f"{error}; {kept}; make room or mend the disk, then start again to resume") from error
        self.latest = final
        self._damaged.discard(final.name)
        self._on_first_rank(f"removing old checkpoints in {self.directory}", self._prune)
        return final

    def load_latest(self, engine: Shardable) -> Checkpoint | None:
        """Load the newest checkpoint whose files are all as they were written; None where there has never been one.

        Raises CheckpointError where checkpoints exist but none is usable: training never starts afresh in their place.
        """
        self._on_first_rank(f"clearing {self.directory}", self._remove_leftovers)
        candidates, pointer_problem = self.ranks.broadcast_object(self._candidates() if self.ranks.rank == 0 else ([], None))
        if pointer_problem:
            self._warn(pointer_problem)
        for name in candidates:
            directory = self.directory / name
            problem = self._first_problem(directory)
            if problem is None:
                manifest = _read_manifest(directory)
                self._on_all_ranks(f"loading {directory}", partial(engine.load_shards, directory))
                self.latest = directory
                return Checkpoint(directory, manifest["step"], manifest["world_size"], manifest["state"])
            self._warn(f"skipping checkpoint {directory}: {problem}")
            self._damaged.add(name)
        if candidates or pointer_problem:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is usable (the warnings above say why): restore one from a copy, "
                "or choose another --output to train from the beginning"
            )
        return None

    def _on_all_ranks(self, doing: str, action: Callable[[], R]) -> R:
        return raise_on_all_ranks(self.ranks, CheckpointError, doing, action)

    def _on_first_rank(self, doing: str, action: Callable[[], object]) -> None:
        raise_on_all_ranks(self.ranks, CheckpointError, doing, action if self.ranks.rank == 0 else lambda: None)

    def _warn(self, text: str) -> None:
        if self.ranks.rank == 0:
            logger.warning("%s", text)

    def _candidates(self) -> tuple[list[str], str | None]:
        """Names to try, best first, and what is wrong with the pointer, if anything."""
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
        """What is wrong with a checkpoint, agreed by all ranks, each of which verifies its share of the files."""
        try:
            entries = [FileEntry(**entry) for entry in _read_manifest(directory)["files"]]
            share = entries[self.ranks.rank :: self.ranks.size]
            problem = next(filter(None, (_problem(directory, entry) for entry in share)), None)
        except (OSError, CheckpointError) as error:
            problem = str(error)
        if self.ranks.all_true(problem is None):
            return None
        return next(filter(None, self.ranks.gather_objects(problem)))

    def _prune(self) -> None:
        """Keep the one just written and the newest before it; later ones are what a damaged or abandoned run left."""
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


def _seal(directory: Path, ranks: Ranks) -> list[FileEntry]:
    """Force this rank's share of all files to the disk and hash it; shares are by name, so that the work is even."""
    share = _files(directory)[ranks.rank :: ranks.size]
    for name in share:
        sync(directory / name)
    return [FileEntry(name, (directory / name).stat().st_size, sha256_of_file(directory / name)) for name in share]


def _publish(aside: Path, final: Path, manifest: dict[str, Any], entries: list[list[FileEntry]]) -> None:
    files = sorted((vars(entry) for share in entries for entry in share), key=lambda entry: str(entry["name"]))
    if [entry["name"] for entry in files] != _files(aside):
        raise OSError(f"the ranks see different files in {aside}: the shared file system lags behind")
    content = {**manifest, "files": files}
    write_file(aside / MANIFEST, json.dumps({**content, "sha256": _checksum(content)}, indent=1, allow_nan=False).encode())
    for folder in (path for path in aside.rglob("*") if path.is_dir()):
        sync(folder)
    sync(aside)
    if final.exists():
        shutil.rmtree(final)
    os.rename(aside, final)  # noqa: PTH104
    sync(final.parent)
    write_file(final.parent / POINTER, f"{final.name}\n".encode())


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Raises CheckpointError where it is missing or no manifest of this format."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"missing {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        sound = manifest.pop("sha256") == _checksum(manifest)
    except (ValueError, AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{MANIFEST} is damaged")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{MANIFEST} has format {manifest['format']}; this dstrain reads {FORMAT}")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    return sha256_of_json(manifest)


def _problem(directory: Path, entry: FileEntry) -> str | None:
    path = directory / entry.name
    if not path.is_file():
        return f"missing file {entry.name}"
    size = path.stat().st_size
    if size != entry.size:
        return (
            f"truncated file {entry.name}: {size} of {entry.size} bytes" if size < entry.size else f"file {entry.name} has grown"
        )
    if sha256_of_file(path) != entry.sha256:
        return f"hash mismatch in {entry.name}: its bytes are not those that were written"
    return None
