"""What a directory is, known by its file names, for messages about one that was named in place of another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

DirectoryKind = Literal["a bundle", "a run", "dumped logits", "prepared data", "a checkpoint"]

MARKERS: dict[DirectoryKind, tuple[str, ...]] = {
    "a bundle": ("model.yaml", "adapter/adapter.yaml"),
    "a run": ("events.jsonl", "run.json"),
    "dumped logits": ("logits.json",),
    "prepared data": ("job.json", "train"),
    "a checkpoint": ("manifest.json",),
}
"""A kind -> names of which it has one, in the order of the checks."""
INSIDE: dict[DirectoryKind, tuple[str, ...]] = {"a bundle": ("bundles", "."), "a checkpoint": ("checkpoints", ".")}
"""A kind that lies in others -> where."""


def directory_kind(directory: Path) -> DirectoryKind | None:
    """The kind of a directory; None if dstrain has not written it."""
    return next((kind for kind, names in MARKERS.items() if any((directory / name).exists() for name in names)), None)


def instead_of(requested: DirectoryKind, path: Path) -> str:
    """The end of a message about a path that is not `requested`: what was meant, or what it is."""
    if not path.exists():
        return "there is no such directory"
    if not path.is_dir():
        return f"it is a file; name the directory of {requested}"
    near = next((other for other in _near(requested, path) if directory_kind(other) == requested), None)
    if near is not None:
        return f"did you mean {near}?"
    kind = directory_kind(path)
    if (kind, requested) == ("a checkpoint", "a bundle"):
        return f"it is a checkpoint; make a bundle of it: dstrain consolidate {path} --output BUNDLE"
    return f"it is {kind}; name {requested}" if kind else f"name {requested} that dstrain has written"


def _near(requested: DirectoryKind, path: Path) -> Iterator[Path]:
    """Directories in and above a path, the likeliest first: the best bundle, the last, the newest."""
    for parent in INSIDE.get(requested, ()):
        numbered = sorted((path / parent).glob("step_*"), key=lambda step: [int(n) for n in re.findall(r"\d+", step.name)])
        yield from (path / parent / "best", path / parent / "last", *reversed(numbered))
    yield from path.parents[:2]
