"""A checkpoint of any layout becomes a bundle, in constant memory: pieces of tensors are read, hashed and written in a stream."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from dstrain.checkpoint.adapter_files import ADAPTER_FORMAT
from dstrain.checkpoint.bundle import DESCRIPTION, fresh_directory
from dstrain.checkpoint.directories import ADAPTER, ADAPTER_WEIGHTS, ADAPTER_YAML, MODEL, WEIGHTS, is_adapter, require_checkpoint
from dstrain.checkpoint.reader import StoredCheckpoint, open_checkpoint
from dstrain.checkpoint.snapshot import TEMPLATE
from dstrain.checkpoint.tensor_file import TensorInfo, file_order, write_tensors
from dstrain.errors import CheckpointError
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, check_canonical, parameter_layouts
from dstrain.progress import with_progress
from dstrain.storage.outputs import check_output_path

WeightChoice = Literal["as_bundles", "averaged", "trained"]
KINDS = {"averaged": "ema", "trained": "master"}
NOTES = ("step", "num_targets", "best_score")
"""The notes of a run's bundles, from the trainer's state."""


def consolidate(checkpoint: Path, output: Path, *, weights: WeightChoice = "as_bundles", overwrite: bool = False) -> str:
    """Write the bundle of a checkpoint; returns the kind of weights it holds, `averaged` or `trained`.

    weights: `as_bundles` takes the moving average if the run has one. Memory: one piece of `reader.PIECE` bytes. CheckpointError
    if the checkpoint is damaged or holds no such weights; errors of the output as `save_bundle`.
    """
    require_checkpoint(checkpoint)
    stored = open_checkpoint(checkpoint)
    check_output_path(output, {"CHECKPOINT": checkpoint})
    has_average = bool(stored.names(KINDS["averaged"]))
    choice = weights if weights != "as_bundles" else "averaged" if has_average else "trained"
    if choice == "averaged" and not has_average:
        raise CheckpointError(f"{checkpoint} holds no moving average: its run has no training.ema; choose --weights trained")
    template = checkpoint / TEMPLATE
    if not template.is_dir():
        raise CheckpointError(f"{checkpoint} has no {TEMPLATE}/, which describes the model; name a checkpoint of `dstrain train`")
    with fresh_directory(output, overwrite=overwrite) as fresh:
        for path in sorted(template.rglob("*")):  # shutil.copytree would raise a list of tuples
            copy = fresh / path.relative_to(template)
            copy.mkdir() if path.is_dir() else shutil.copyfile(path, copy)
        if is_adapter(template):
            _write_adapter(stored, KINDS[choice], template, fresh, output)
        else:
            _write_model(stored, KINDS[choice], fresh)
    return choice


def _write_model(stored: StoredCheckpoint, kind: str, fresh: Path) -> None:
    description = DESCRIPTION.read(fresh / MODEL)
    infos = _weight_infos(stored, kind)
    shapes = {name: torch.empty(info.shape, device="meta") for name, info in infos.items()}
    check_canonical(parameter_layouts(build_model(description.model, description.vocabulary, seed=None)), TensorSource(shapes))
    digest = _stream(stored, kind, infos, fresh / WEIGHTS)
    DESCRIPTION.write(fresh / MODEL, description.model_copy(update={"sha256": digest, "notes": _notes(stored)}))


def _write_adapter(stored: StoredCheckpoint, kind: str, template: Path, fresh: Path, output: Path) -> None:
    """A relative reference to the base is one from the template; the bundle's own is relative too."""
    path = fresh / ADAPTER / ADAPTER_YAML
    description = ADAPTER_FORMAT.read(path)
    base = description.base
    check_output_path(output, {f"the base {base.path}": template / base.path})
    if not Path(base.path).is_absolute():
        moved = os.path.relpath((template / base.path).resolve(), output.resolve())
        base = base.model_copy(update={"path": moved})
    digest = _stream(stored, kind, _weight_infos(stored, kind), fresh / ADAPTER / ADAPTER_WEIGHTS)
    ADAPTER_FORMAT.write(path, description.model_copy(update={"sha256": digest, "notes": _notes(stored), "base": base}))


def _weight_infos(stored: StoredCheckpoint, kind: str) -> dict[str, TensorInfo]:
    """The model's tensors; parameters that belong to the objective are in no bundle."""
    names = (name for name in stored.names(kind) if not name.startswith("objective."))
    return {name: stored.tensors[f"{kind}/{name}"] for name in names}


def _stream(stored: StoredCheckpoint, kind: str, infos: dict[str, TensorInfo], path: Path) -> str:
    names = with_progress(file_order(infos), "consolidating", "tensors")
    pieces: Iterable[torch.Tensor] = (piece for name in names for piece in stored.pieces(f"{kind}/{name}"))
    return write_tensors(path, infos, pieces)[1]


def _notes(stored: StoredCheckpoint) -> dict[str, Any]:
    return {name: stored.manifest.state[name] for name in NOTES if name in stored.manifest.state}
