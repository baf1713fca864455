"""RUN: one training run in one directory, locked while it trains, and never continued under another recipe.

```
RUN/recipe.yaml   the recipe the run was started with, resolved
RUN/run.json      format, run_id, fingerprints of the data and of the teachers, if any, accepted changes
RUN/events.jsonl  what happened (events.py)
RUN/checkpoints/  for resuming          RUN/bundles/   models: best, last, step_...
RUN/.lock         held by rank 0 while it trains
```
A run may be continued with another recipe if the difference does not decide the result: when training ends, what it reports,
validates and keeps, and how a step is computed (ranks, ZeRO stage, precision). Every other difference is refused and shown,
unless it is one that a user may accept (`accepted_changes.py`). Of the data it is the content that counts, not where it lies.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dstrain.config_base import Config
from dstrain.errors import CheckpointError, TrainingError
from dstrain.log import logger
from dstrain.parallel.errors import raise_on_all_ranks
from dstrain.storage.atomic import write_file
from dstrain.storage.document import DocumentFormat, read_mapping
from dstrain.storage.lock import OutputLock, lock_holder, lock_output
from dstrain.storage.outputs import require_run_as_output
from dstrain.storage.parsing import dump_yaml
from dstrain.training.accepted_changes import is_acceptable, is_accepted, option_for, value_at, with_values

if TYPE_CHECKING:  # so that the command line checks a run without loading torch
    from dstrain.protocols import Ranks

RUN_VERSION = 1
Upgrade = Callable[[Mapping[str, Any]], Mapping[str, Any]]
MAY_CHANGE = {
    "description",
    "batching.max_tokens",
    "objective.chunk_tokens",
    "training.max_steps",
    "training.max_epochs",
    "training.max_hours",
    "training.hang_seconds",
}
SECTIONS_MAY_CHANGE = ("reporting.", "generation.", "validation.", "checkpoint.", "engine.", "data.")
MAY_NOT_CHANGE = {"engine.clip_norm": "clips other gradients"}
"""Exceptions in these sections, with the reason."""
LAYOUT_KEYS = {"engine.deepspeed", "engine.precision"}
"""Every checkpoint records their values."""
LONGEST_VALUE = 100
"""Characters of a value in a message."""


class RunDescription(Config):
    """run.json. data: fingerprint of what is read of the prepared data; teachers: of all that teaches.

    accepted: values of the recipe that were changed since the run was started, by dotted key.
    """

    format: int
    run_id: str
    data: str
    teachers: tuple[str, ...] = ()
    accepted: dict[str, Any] = Field(default_factory=dict)


_REMEDY = "restore it, or choose another --output"
RUN_FORMAT = DocumentFormat(
    RunDescription, "description of a run", CheckpointError, _REMEDY, version_field="format", version=RUN_VERSION
)


@dataclass
class Run:
    """An open run. run_id: the same over all resumes. changes: `a.b: old -> new` since it was started.

    Closing it lets go of the lock.
    """

    directory: Path
    run_id: str
    changes: tuple[str, ...] = ()
    _lock: OutputLock | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoint manager writes."""
        return self.directory / "checkpoints"

    @property
    def bundles(self) -> Path:
        """Where the bundle store writes."""
        return self.directory / "bundles"

    def close(self) -> None:
        """Let go of the lock; another training may then open the run."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def open_run(
    directory: Path,
    recipe: Mapping[str, Any],
    ranks: Ranks,
    *,
    data: str,
    preparation: str | None = None,
    teachers: Sequence[str] = (),
    upgrade: Upgrade = dict,
    accept: Sequence[str] = (),
) -> Run:
    """Make RUN, or open the one that is there to resume it. Collective; rank 0 holds the lock.

    recipe: the resolved recipe as plain YAML values. data, teachers: fingerprints of what is read of the prepared data and of all
    that teaches. preparation: of the data's preparation, by which runs of an earlier version know it.
    upgrade: resolves a recipe of an earlier version as this one would. accept: keys of the recipe that may differ on a resume.
    Raises TrainingError if another training holds the run or the directory is something else, CheckpointError if the
    recipe, the data or the teachers differ or the run has lost its checkpoints.
    """
    run = Run(directory, "")

    def on_first_rank() -> None:
        if ranks.rank == 0:
            origin = {"data": data, "teachers": list(teachers), "preparation": preparation}
            run._lock, run.run_id, run.changes = _open(directory, recipe, origin, upgrade, accept)

    raise_on_all_ranks(ranks, TrainingError, f"opening {directory}", on_first_rank)
    run.run_id, run.changes = ranks.broadcast_object((run.run_id, run.changes))
    return run


def check_run(directory: Path, recipe: Mapping[str, Any], *, upgrade: Upgrade = dict, accept: Sequence[str] = ()) -> None:
    """Raise the errors of `open_run` that need no data: for a directory that is no run, one in use, and another recipe."""
    is_resumed = _is_resumed(directory, accept)
    if holder := lock_holder(directory):
        raise _busy(directory, holder)
    if is_resumed:
        _compare_recipe(directory, RUN_FORMAT.read(directory / "run.json"), recipe, upgrade, accept)


def recipe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `a.b: old -> new` for every key that differs and may not change on a resume."""
    return [f"  {key}: {change}" for key, change in tree_changes(old, new).items() if not _may_change(key)]


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or (f"{key}.".startswith(SECTIONS_MAY_CHANGE) and key not in MAY_NOT_CHANGE)


def tree_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """`old -> new` of every key that differs; a section that only one side has is one key."""
    changes = {}
    for key, was, now in _differences(old, new):
        reason = f" ({MAY_NOT_CHANGE[key]})" if key in MAY_NOT_CHANGE else ""
        changes[key] = f"{_short(was)} -> {_short(now)}{reason}"
    return changes


_ABSENT = object()


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key and both values, where two trees of plain values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        for number in range(max(len(old), len(new))):
            was, now = (side[number] if number < len(side) else _ABSENT for side in (old, new))
            yield from _differences(was, now, f"{prefix}[{number}]")
    elif old != new:
        yield prefix, old, new


def _short(value: Any) -> str:
    """A value as JSON on one line, cut if it is long."""
    text = "(absent)" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]} ..."


def flatten_tree(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values of a tree; an empty list or mapping is a value, too."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten_tree(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple) and tree:
        for number, value in enumerate(tree):
            yield from flatten_tree(value, f"{prefix}[{number}]")
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree


def _open(
    directory: Path, recipe: Mapping[str, Any], origin: Mapping[str, Any], upgrade: Upgrade, accept: Sequence[str]
) -> tuple[OutputLock, str, tuple[str, ...]]:
    _is_resumed(directory, accept)  # what is something else gets no lock
    lock = lock_output(directory, busy=partial(_busy, directory))
    try:
        if _is_resumed(directory, accept):
            run = _known_run(directory / "run.json", origin)
            return lock, run.run_id, _accept_changes(directory, run, recipe, upgrade, accept)
        return lock, _begin(directory, recipe, origin), ()
    except BaseException:
        lock.release()
        raise


def _is_resumed(directory: Path, accept: Sequence[str]) -> bool:
    """Whether there is a run to resume; False if one can begin. TrainingError for anything else."""
    require_run_as_output(directory)
    if _has_progress(directory):
        return True
    if accept:
        raise CheckpointError(
            f"--accept-changes {','.join(accept)} is for a run that is resumed, but {directory} holds no checkpoint: leave it "
            "out to begin with this recipe, or name the --output of the run"
        )
    return False


def _begin(directory: Path, recipe: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Describe a new run; its id."""
    if (directory / "recipe.yaml").exists():
        logger.warning("%s was started but never reached a checkpoint: starting from the beginning", directory)
    run_id = uuid.uuid4().hex[:16]
    description = RunDescription(format=RUN_VERSION, run_id=run_id, data=origin["data"], teachers=origin["teachers"])
    RUN_FORMAT.write(directory / "run.json", description)
    write_file(directory / "recipe.yaml", dump_yaml(_plain(recipe)).encode())
    return run_id


def _busy(directory: Path, holder: str) -> TrainingError:
    return TrainingError(
        f"another training is running in {directory} ({holder}): wait for it or stop it, or choose another --output"
    )


def _accept_changes(
    directory: Path, run: RunDescription, recipe: Mapping[str, Any], upgrade: Upgrade, accept: Sequence[str]
) -> tuple[str, ...]:
    """All changes since the run was started. Those that are accepted now are recorded, if no other is refused."""
    accepted, changes = _compare_recipe(directory, run, recipe, upgrade, accept)
    if accepted != run.accepted:
        RUN_FORMAT.write(directory / "run.json", run.model_copy(update={"accepted": accepted}))
    return tuple(
        f"{key}: {change}{', accepted' if is_accepted(key, accepted) else ''}"
        for key, change in changes.items()
        if key not in LAYOUT_KEYS
    )


def _compare_recipe(
    directory: Path, run: RunDescription, recipe: Mapping[str, Any], upgrade: Upgrade, accept: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The accepted values, and all changes since the run was started. CheckpointError for a change that is refused."""
    started = upgrade(read_mapping(directory / "recipe.yaml", error=CheckpointError, remedy=_REMEDY))
    new = _plain(recipe)
    accepted = {key: value for key, value in run.accepted.items() if key not in accept}
    accepted |= {key: value_at(new, key) for key in accept}  # the latest is last, and wins
    before = with_values(started, accepted)
    if differences := recipe_differences(before, new):
        refused = [key for key in tree_changes(before, new) if not _may_change(key)]
        by_option = f"accept them with {option_for(refused)}, " if all(map(is_acceptable, refused)) else ""
        raise CheckpointError(
            f"{directory} was started with another recipe; it is not resumed with this one:\n"
            + "\n".join(differences)
            + f"\nundo these changes to resume, {by_option}or choose another --output to train afresh"
        )
    return accepted, tree_changes(started, new)


def _has_progress(directory: Path) -> bool:
    """Whether there is something to resume. Without it any recipe may begin here, as nothing is lost.

    A run that once wrote a checkpoint and now has none is an accident, not a fresh start.
    """
    events = directory / "events.jsonl"
    if any((directory / "checkpoints").glob("step_*")):
        return True
    if not events.is_file():
        return False
    with events.open("rb") as file:
        if any(b'"kind": "checkpoint"' in line or b'"kind": "resume"' in line for line in file):
            raise CheckpointError(
                f"{events} reports checkpoints, but {directory / 'checkpoints'} holds none: "
                "restore them, or choose another --output to train from the beginning"
            )
    return False


def _known_run(path: Path, origin: Mapping[str, Any]) -> RunDescription:
    run = RUN_FORMAT.read(path)
    if run.data not in (origin["data"], origin["preparation"]):
        raise CheckpointError(
            f"{path.parent} was started on other data ({run.data[:12]}, this is {origin['data'][:12]}): "
            "name the --data it was started on, or choose another --output"
        )
    if list(run.teachers) != origin["teachers"]:
        then, now = (" ".join(name[:12] for name in names) or "none" for names in (run.teachers, origin["teachers"]))
        raise CheckpointError(
            f"{path.parent} was started with another teacher ({then}, this is {now}): name the first one, in the same "
            "order, or choose another --output"
        )
    return run


def _plain(tree: Any) -> Any:
    """The same tree in lists and dicts, as YAML gives it back."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree
