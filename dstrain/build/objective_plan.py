"""An objective that fits its recipe and data, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dstrain.models.config import ModelConfig
from dstrain.objectives.objective import Objective
from dstrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class ObjectivePlan:
    """build: makes the objective, loads its teachers; collective.

    teachers: their fingerprints, or that of dumped logits, by which a run identifies them. models: those of the online teachers,
    which read the same batches.
    """

    build: Callable[[Mesh], Objective]
    teachers: tuple[str, ...] = ()
    models: tuple[ModelConfig, ...] = ()
