"""RUN/bundles: the weights of a run as bundles: `best`, `last` and the newest `step_...` ones.

One gathering of the weights serves all names that are due at a step; further names are hard links to the first one's files, so
they cost no space. A directory is complete or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.checkpoint.directories import step_bundles
from dstrain.errors import TrainingError
from dstrain.parallel.errors import raise_on_all_ranks
from dstrain.protocols import Ranks
from dstrain.storage.atomic import atomic_directory, link_or_copy, restore_directories

SaveBundle = Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], None]
"""Writes a bundle into an empty directory: (directory, canonical weights, notes)."""


class BundleStore:
    """Writes and prunes the bundles of a run; every public method is collective.

    gather: canonical weights on rank 0, None elsewhere (collective). save: writes a bundle of them. keep: how many of the
    newest step bundles stay; `best` and `last` always do.
    """

    def __init__(
        self, directory: Path, ranks: Ranks, *, gather: Callable[[], Mapping[str, Tensor] | None], save: SaveBundle, keep: int
    ) -> None:
        self.directory = directory
        self.ranks = ranks
        self.keep = keep
        self._gather = gather
        self._save = save

    def recover(self) -> None:
        """Undo the unfinished work of an earlier process."""
        raise_on_all_ranks(self.ranks, TrainingError, f"clearing {self.directory}", self._recover)

    def write(self, names: Sequence[str], notes: Mapping[str, Any]) -> None:
        """Write the current weights under each of `names`. Raises TrainingError on every rank if rank 0 fails."""
        weights = self._gather()
        raise_on_all_ranks(
            self.ranks,
            TrainingError,
            f"writing the bundle {self.directory / names[0]}",
            lambda: self._write(names, weights, notes),
        )

    def _write(self, names: Sequence[str], weights: Mapping[str, Tensor] | None, notes: Mapping[str, Any]) -> None:
        if weights is None or self.ranks.rank != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        first, *others = names
        with atomic_directory(self.directory / first) as draft:
            self._save(draft, weights, notes)
        for name in others:
            with atomic_directory(self.directory / name) as draft:
                shutil.copytree(self.directory / first, draft, copy_function=_link, dirs_exist_ok=True)
        for path in step_bundles(self.directory)[: -self.keep]:
            shutil.rmtree(path)

    def _recover(self) -> None:
        if self.ranks.rank == 0 and self.directory.is_dir():
            for pattern in ("..*", ".*.new"):  # in this order: a draft within a draft has the longer name
                for path in self.directory.glob(pattern):
                    shutil.rmtree(path)
            restore_directories(self.directory)


def _link(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))
