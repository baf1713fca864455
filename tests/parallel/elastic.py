"""A curve that is continued by other numbers of ranks, ZeRO stages and precisions."""

import hashlib
from pathlib import Path
from typing import Any

from dstrain.checkpoint.manifest import read_manifest
from dstrain.checkpoint.reader import StoredCheckpoint
from dstrain.engine.training_engine import TrainEngine
from dstrain.parallel.mesh import Mesh
from tests.parallel.adapting import adapted_module, adapting_engine
from tests.parallel.distilling import queues, share, student
from tests.parallel.setting import build_engine, build_module, load, save

Report = dict[str, Any]
SELECTIVE: Report = {
    "selection": {"kind": "global", "rate": 0.5, "queue_size": 150},
    "features": [{"kind": "hidden_states", "side": "decoder", "loss": "mse", "weight": 0.1}],
}


def engine_of(mesh: Mesh, kind: str, **options: Any) -> TrainEngine:
    """One of the kinds of training whose state differs; with dropout, whose masks depend on no layout."""
    match kind:
        case "averaged":
            decayed = {"kind": "adamw", "weight_decay": 0.1}
            return build_engine(mesh, build_module(dropout=0.1), ema={"decay": 0.7}, clip_norm=1.0, optimizer=decayed, **options)
        case "stable_adamw":
            return build_engine(
                mesh, build_module(dropout=0.1), optimizer={"kind": "stable_adamw", "weight_decay": 0.1}, **options
            )
        case "adapted":
            return adapting_engine(
                mesh, adapted_module(factorized=False, dropout=0.1, dora=True, bias="all"), ema=True, **options
            )
        case "selective":
            return student(mesh, objective=SELECTIVE, dropout=0.1, **options)
    raise ValueError(kind)


def legs(mesh: Mesh, *, runs: list[Report]) -> list[Report]:
    """Each run on its own; see `leg`."""
    return [leg(mesh, **run) for run in runs]


def leg(mesh: Mesh, *, kind: str, source: str | None, target: str | None, first: int, last: int, **options: Any) -> Report:
    """Steps [first, last) of a curve, from the checkpoint in `source` on, saved in `target`; with what was read and written."""
    engine = engine_of(mesh, kind, **options)
    if source is not None:
        load(engine, Path(source))
    again = save(engine, Path(f"{target or source}.again")) if source is not None else None
    losses = [engine.train_step(*share(step, mesh, 4)).loss for step in range(first, last)]
    saved = None if target is None else save(engine, Path(target))
    report = {
        "losses": losses,
        "queue": queues(engine),
        "layout": engine.layout,
        "loaded": mesh.world.rank == 0 and again and digests(again),
        "saved": mesh.world.rank == 0 and saved and digests(saved),
    }
    engine.close()
    mesh.world.barrier()
    return report


def digests(directory: Path) -> dict[str, str]:
    """A hash of every tensor of a checkpoint, whatever files it lies in."""
    stored = StoredCheckpoint(directory, read_manifest(directory))
    return {name: hashlib.sha256(stored.read(name).numpy().tobytes()).hexdigest()[:16] for name in stored.tensors}
